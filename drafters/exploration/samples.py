"""Samples of a policy that its drafters are judged on: its answers to prompts."""

from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from drafters.training.samples import Sample

BATCH_SIZE = 64


@torch.no_grad()
def sample_responses(
    policy: PreTrainedModel,
    prompts: list[list[int]],
    bar: Progress,
    *,
    tokens: int,
    response_tokens: int,
    temperature: float,
    seed: int,
) -> list[Sample]:
    """Responses of the policy by transformers' `generate`: prompt after prompt, until they have `tokens` tokens.

    A response ends with the end-of-sequence token, or after `response_tokens` tokens. Prompts are token ids.
    """
    # The checkpoint's own sampling settings, such as a repetition penalty, would change the distribution.
    policy.generation_config = GenerationConfig(eos_token_id=policy.generation_config.eos_token_id)  # type: ignore[union-attr]
    task = bar.add_task("responses", total=tokens)
    torch.manual_seed(seed)
    samples: list[Sample] = []
    while not bar.tasks[task].finished:
        first = len(samples)
        batch = [prompts[i % len(prompts)] for i in range(first, first + BATCH_SIZE)]
        samples += _responses(policy, batch, response_tokens, temperature)
        bar.advance(task, sum(len(sample.response) for sample in samples[first:]))
    return samples


def _responses(policy: Any, prompts: list[list[int]], response_tokens: int, temperature: float) -> list[Sample]:
    width = max(map(len, prompts))
    tokens_BT = torch.zeros(len(prompts), width, dtype=torch.long)
    mask_BT = torch.zeros_like(tokens_BT)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, width - len(prompt) :] = torch.tensor(prompt)
        mask_BT[row, width - len(prompt) :] = 1
    written_BT: Tensor = policy.generate(
        input_ids=tokens_BT.to(policy.device), attention_mask=mask_BT.to(policy.device), do_sample=True,
        temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=response_tokens, pad_token_id=0,
    )[:, width:]  # fmt: skip
    ends = torch.tensor(policy.generation_config.eos_token_id or [], device=written_BT.device)
    ended_BT = torch.isin(written_BT, ends)
    lengths = torch.where(ended_BT.any(1), ended_BT.int().argmax(1) + 1, written_BT.shape[1]).tolist()
    return [
        Sample(prompt, response[:length])
        for prompt, response, length in zip(prompts, written_BT.tolist(), lengths, strict=True)
    ]
