"""NeMo-Gym's model server for vLLM (responses_api_models/vllm_model), started in this process, in front of the service.

With `return_token_id_information` it needs the token ids of the prompt and of the response, and log-probabilities.
"""

import sys
from unittest.mock import MagicMock

import httpx
from checks import MODEL, PROMPTS, Checks, equal
from nemo_gym.server_utils import ServerClient
from responses_api_models.vllm_model.app import VLLMModel, VLLMModelConfig

checks = Checks("nemo-gym")
del sys.argv[1:]  # NeMo-Gym reads a configuration from the command line of its process


async def asked(path: str, body: dict, **config: object) -> dict:
    """The model server's answer."""
    settings = VLLMModelConfig(
        host="127.0.0.1", port=1, entrypoint="", name="model", base_url=f"{checks.endpoint}/v1", api_key="none",
        model=MODEL, uses_reasoning_parser=False, **{"return_token_id_information": True} | config,
    )  # fmt: skip
    server = VLLMModel(config=settings, server_client=MagicMock(spec=ServerClient, global_config_dict={}))
    transport = httpx.ASGITransport(server.setup_webserver())
    async with httpx.AsyncClient(transport=transport, base_url="http://model", timeout=60) as client:
        answer = await client.post(path, json=body)
    equal(answer.status_code, 200, answer.text[:300])
    return answer.json()


def check_tokens(of: dict) -> int:
    lengths = {name: len(of[name]) for name in ("prompt_token_ids", "generation_token_ids", "generation_log_probs")}
    equal(lengths["generation_token_ids"], lengths["generation_log_probs"], "log-probabilities")
    assert min(lengths.values()) > 0, lengths
    return lengths["generation_token_ids"]


MESSAGES = [{"role": "user", "content": PROMPTS[0].strip()}]


@checks.call("/v1/chat/completions, prompt ids by POST /tokenize")
async def by_tokenize() -> str:
    answer = await asked("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 24, "temperature": 1.0})
    return f"{check_tokens(answer['choices'][0]['message'])} tokens with log-probabilities"


@checks.call("/v1/chat/completions, prompt ids in the answer")
async def inline() -> str:
    body = {"messages": MESSAGES, "max_tokens": 24, "temperature": 1.0}
    answer = await asked("/v1/chat/completions", body, request_prompt_and_generation_token_ids=True)
    return f"{check_tokens(answer['choices'][0]['message'])} tokens with log-probabilities"


@checks.call("/v1/responses")
async def responses() -> str:
    body = {"input": PROMPTS[0].strip(), "max_output_tokens": 24, "temperature": 1.0}
    answer = await asked("/v1/responses", body)
    (item,) = [item for item in answer["output"] if item["type"] == "message"]
    return f"{check_tokens(item)} tokens with log-probabilities"


@checks.call("/v1/chat/completions over /v1/completions")
async def completions() -> str:
    body = {"messages": MESSAGES, "max_tokens": 24, "temperature": 1.0}
    answer = await asked("/v1/chat/completions", body, use_completions_api=True)
    return f"{check_tokens(answer['choices'][0]['message'])} tokens with log-probabilities"
