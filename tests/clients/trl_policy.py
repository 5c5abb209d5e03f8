"""The demo's policy in transformers, and what its log-probabilities say of the service's. For the scripts of TRL."""

import torch
from checks import POLICY
from transformers import AutoModelForCausalLM, AutoTokenizer

WITHIN = 1e-4
"""nats: the service runs in float32, so the difference is one of numerics"""


def variety(completions: list, **_: object) -> list[float]:
    """A reward function: it differs wherever responses differ, so that every step has a gradient."""
    texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
    return [sum(map(ord, text)) % 97 / 97 for text in texts]


def policy() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32).eval()


def tokenizer():
    return AutoTokenizer.from_pretrained(POLICY)


@torch.no_grad()
def token_logprobs(model: torch.nn.Module, prompt: list[int], completion: list[int]) -> list[float]:
    """Log-probabilities of a completion's tokens at temperature 1."""
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].float()
    logprobs = logits.log_softmax(-1)
    return logprobs.gather(1, torch.tensor(completion)[:, None])[:, 0].tolist()


def difference(model: torch.nn.Module, answer: dict, n: int) -> float:
    """Largest difference between the model's log-probabilities and those in an answer of TRL's VLLMClient to prompts
    with n completions each, in nats."""
    worst = 0.0
    for i, completion in enumerate(answer["completion_ids"]):
        expected = token_logprobs(model, answer["prompt_ids"][i // n], completion)
        given = [position[0] for position in answer["logprobs"][i]]
        assert len(given) == len(expected), f"{len(given)} log-probabilities for {len(expected)} tokens"
        worst = max([worst, *(abs(a - b) for a, b in zip(given, expected, strict=True))])
    return worst


def agreement(model: torch.nn.Module, answer: dict, n: int) -> float:
    """`difference`, which must be below WITHIN."""
    worst = difference(model, answer, n)
    assert worst < WITHIN, f"log-probabilities differ by {worst:.1e}"
    return worst
