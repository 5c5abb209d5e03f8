"""TRL's VLLMClient: generate, chat and get_sequence_logprobs, against the policy in transformers."""

import math

from checks import POLICY, PROMPTS, Checks, equal
from trl.generation.vllm_client import VLLMClient
from trl_policy import WITHIN, agreement, policy, token_logprobs, tokenizer

from rollout_service.adapters.trl import checkpoint_tensors
from rollout_service.client import RolloutClient

checks = Checks("trl")
client = VLLMClient(base_url=checks.endpoint)
model = policy()
ids = tokenizer()(PROMPTS)["input_ids"]
with RolloutClient(checks.endpoint) as service:
    version = service.weights().policy.version
    if version > 0:  # a service that other clients have used: give it the policy's own weights again
        named = dict(model.named_parameters())
        service.push_weights("policy", checkpoint_tensors(str(POLICY), named), version + 1)


@checks.call("VLLMClient.generate")
def generate() -> str:
    answer = client.generate(ids, n=4, max_tokens=48, temperature=1.0)
    equal(answer["prompt_ids"], ids, "the prompts")
    equal(len(answer["completion_ids"]), 8, "completions")
    return f"log-probabilities differ by {agreement(model, answer, n=4):.0e}"


@checks.call("VLLMClient.chat")
def chat() -> str:
    messages = [[{"role": "user", "content": prompt.strip()}] for prompt in PROMPTS]
    answer = client.chat(messages, n=2, max_tokens=48, temperature=1.0)
    answer["prompt_ids"] = [list(prompt) for prompt in answer["prompt_ids"]]
    return f"log-probabilities differ by {agreement(model, answer, n=2):.0e}"


@checks.call("VLLMClient.get_sequence_logprobs")
def sequences() -> str:
    completion = client.generate(ids[:1], max_tokens=24)["completion_ids"][0]
    answer = client.get_sequence_logprobs([ids[0] + completion], [len(ids[0])], top_logprobs=20)
    given = [position[0] for position in answer["actual_logprobs"][0]]
    expected = token_logprobs(model, ids[0], completion)
    worst = max(abs(a - b) for a, b in zip(given, expected, strict=True) if math.isfinite(a))
    assert worst < WITHIN, f"log-probabilities differ by {worst:.1e}"
    return f"log-probabilities differ by {worst:.0e}"
