"""SkyRL's remote inference client and its weight-sync client, by themselves: the data plane and the control plane.

Both only name torch's types, so this script gives them a stand-in where torch is not installed.
"""

import sys
from unittest.mock import MagicMock

from checks import MODEL, PROMPTS, Checks, equal

try:
    import torch  # noqa: F401
except ImportError:
    sys.modules["torch"] = MagicMock(name="torch")

from skyrl.backends.skyrl_train.inference_servers.remote_inference_client import RemoteInferenceClient
from skyrl.backends.skyrl_train.weight_sync.control_plane import SkyrlWeightSyncClient

checks = Checks("skyrl")
URL = checks.endpoint


def client() -> RemoteInferenceClient:
    return RemoteInferenceClient(proxy_url=URL, server_urls=[URL], data_parallel_size=1, model_name=MODEL)


def bodies(answers: dict) -> dict:
    """The body of the one server's answer."""
    equal((list(answers), answers[URL]["status"]), ([URL], 200), "the server and its status")
    return answers[URL]["body"]


@checks.call("tokenize, generate, detokenize")
async def generate() -> str:
    async with client() as remote:
        prompts = await remote.tokenize(PROMPTS)
        asked = {"temperature": 1.0, "max_tokens": 24, "logprobs": 0}
        answer = await remote.generate(
            {"prompt_token_ids": prompts, "sampling_params": asked, "session_ids": ["a", "b"], "cache_salt": "1"}
        )
        equal([len(ids) for ids in answer["response_ids"]], [len(p) for p in answer["response_logprobs"]], "lengths")
        texts = await remote.detokenize(answer["response_ids"])
        equal(answer["responses"], texts, "texts")
        assert set(answer["stop_reasons"]) <= {"stop", "length"}, answer["stop_reasons"]
    return "token ids and log-probabilities of 2 prompts"


@checks.call("sample")
async def sample() -> str:
    async with client() as remote:
        (prompt,) = await remote.tokenize(PROMPTS[:1])
        request = {
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": prompt}]},
            "num_samples": 3,
            "sampling_params": {"temperature": 1.0, "max_tokens": 24},
            "include_prompt_logprobs": True,
        }
        answer = await remote.sample({"json": request})
    equal(len(answer["sequences"]), 3, "sequences")
    equal(len(answer["prompt_logprobs"]), len(prompt), "log-probabilities of the prompt")
    return "3 sequences, log-probabilities of the prompt"


@checks.call("chat_completion, render_chat_completion")
async def chat() -> str:
    async with client() as remote:
        body = {"messages": [{"role": "user", "content": PROMPTS[0].strip()}], "max_tokens": 24, "session_id": "a"}
        answer = await remote.chat_completion({"json": body})
        rendered = await remote.render_chat_completion({"json": body})
    equal(len(rendered["token_ids"]), answer["usage"]["prompt_tokens"], "tokens of the prompt")
    return "the rendered prompt has as many tokens as the answered one"


@checks.call("pause, resume, reset_prefix_cache, sleep, wake_up, get_world_size")
async def control() -> str:
    async with client() as remote:
        for mode in ("keep", "wait", "abort"):
            bodies(await remote.pause(mode))
            bodies(await remote.resume())
        bodies(await remote.reset_prefix_cache(reset_running_requests=True))
        bodies(await remote.sleep(level=1))
        bodies(await remote.wake_up(tags=["weights"]))
        bodies(await remote.wake_up(tags=["kv_cache"]))
        world, _ = await remote.get_world_size()
    equal(world, 1, "the world size")
    return "all three modes; world size 1"


@checks.call("SkyrlWeightSyncClient: pause, start, finish without tensors, resume")
def cut_update() -> str:
    sync = SkyrlWeightSyncClient([URL])
    sync.pause_generation()
    try:
        sync.start_weight_update()
        sync.finish_weight_update()
    except RuntimeError as error:
        return f"refused: {error}"
    finally:
        sync.resume_generation()
        sync.close()
    raise AssertionError("an update without tensors was taken")
