"""Samples of the policy by transformers, graded by the task's own verifier."""

import torch
from rich.progress import track

from drafters.training.samples import Sample

MAX_NEW_TOKENS = 160
BATCH_SIZE = 512


@torch.no_grad()
def sample(policy, tokenizer, problems: list[dict], title: str | None = None) -> list[Sample]:
    """One response each at temperature 1, from torch's global generator; a progress bar where there is a title."""
    samples = []
    tokenizer.padding_side = "left"
    policy.eval()
    for start in track(range(0, len(problems), BATCH_SIZE), description=title or "", disable=title is None):
        prompts = [problem["question"] + "\n" for problem in problems[start : start + BATCH_SIZE]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True)
        written = policy.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=MAX_NEW_TOKENS,
        )[:, inputs.input_ids.shape[1] :]
        for prompt, response in zip(prompts, written.tolist(), strict=True):
            end = response.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in response else len(response)
            samples.append(Sample(tokenizer.encode(prompt), response[:end]))
    policy.train()
    return samples


def right_and_length(dataset, problems: list[dict], tokenizer, samples: list[Sample]) -> tuple[float, float]:
    """Share of right answers, and mean response tokens (the end-of-sequence token included)."""
    answers = [tokenizer.decode(s.response, skip_special_tokens=True).rsplit("Answer: ", 1)[-1] for s in samples]
    right = [dataset.score_answer(a, problem) == 1.0 for a, problem in zip(answers, problems, strict=True)]
    return sum(right) / len(right), sum(len(s.response) for s in samples) / len(samples)
