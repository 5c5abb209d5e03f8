"""Judgement of an engine's samples by the policy as transformers computes it, in float32 on the CPU."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from vllm import LLM, SamplingParams

from drafters.scoring import SurprisalSums, join_scores
from rollout_service.evaluation.cut import Cut
from rollout_service.evaluation.exact_policy import Recomputation, Response

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput

TOKENS = 48
"""tokens of a response"""
PROMPT_TOKENS = 6
A_PROMPT = 4
"""sampled responses to each prompt"""


class Sampled(NamedTuple):
    prompt: list[int]
    completion: "CompletionOutput"


def sampled(llm: LLM, responses: int, cut: Cut) -> list[Sampled]:
    """`responses` responses to random prompts, several to each. At temperature 0, one response to each prompt."""
    random = torch.Generator().manual_seed(0)
    count = max(1, responses // A_PROMPT)
    prompts = [torch.randint(3, 150, (PROMPT_TOKENS,), generator=random).tolist() for _ in range(count)]
    params = SamplingParams(
        n=A_PROMPT if cut.temperature else 1,
        max_tokens=TOKENS,
        ignore_eos=True,
        logprobs=0,
        flat_logprobs=True,
        **cut._asdict(),
    )
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [Sampled(list(o.prompt_token_ids), completion) for o in outputs for completion in o.outputs]


def judgement(samples: list[Sampled], policy: Path, cut: Cut) -> str:
    """z, differences of log-probabilities in nats, and acceptance.

    The last step of a completion may yield tokens beyond the limit. So a completion has between 0 and k fewer tokens
    than its steps yielded.
    """
    completions = [completion for _, completion in samples]
    responses = [Response(prompt, list(completion.token_ids)) for prompt, completion in samples]
    scores = join_scores(Recomputation(policy).scores(responses, cut))
    returned = torch.tensor([logprob for c in completions for logprob in c.logprobs.logprobs])
    difference = (returned - scores.sampled_logprobs).abs()
    z = f"z {SurprisalSums.of(scores).z:.2f}" if cut.temperature else "greedy"

    records = [(len(c.token_ids), c.spec_decode_metrics) for c in completions if c.spec_decode_metrics]
    drafted = sum(metrics.num_draft_tokens for _, metrics in records)
    accepted = sum(j * steps for _, metrics in records for j, steps in enumerate(metrics.histogram))
    remainders = {n - sum(metrics.per_step_accepted) - len(metrics.per_step_accepted) for n, metrics in records}
    return (
        f"{z} of {len(returned)} tokens; |dlogprob| max {difference.max():.2e} mean {difference.mean():.2e}; "
        f"accepted {accepted}/{drafted}; tokens minus those of the steps: {sorted(remainders)}"
    )
