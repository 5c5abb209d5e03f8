"""What is measured: the typed metrics of a step and of an evaluation, and how they are computed from rollouts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from pydantic import BaseModel

from drafters.acceptance import Acceptance, total
from drafters.scoring import TokenScores
from rl_loop.batching import Rollout
from rollout_service.protocol import Completion, Group

Stage = Literal["data", "prepare", "generation", "logprob", "train"]
STAGES: tuple[Stage, ...] = get_args(Stage)


class RolloutMetrics(BaseModel):
    """Of the completions of one batch."""

    reward: float
    """mean"""
    reward_std: float
    pass_rate: float
    """share of right responses"""
    response_length: float
    """mean, in tokens"""
    truncated: float
    """share of responses that max_tokens ended"""
    tokens: int
    """of all responses"""
    draft_steps: int
    accepted: int
    """draft tokens"""
    acceptance_length: float | None
    """accepted / draft_steps + 1; None without a drafter"""


class MismatchMetrics(BaseModel):
    """Between the trainer's log-probabilities p and the rollout's q of the same tokens; no mismatch is 0, 0, 1, 0."""

    logprob_difference_max: float
    """of |log p - log q|"""
    logprob_difference: float
    """mean of |log p - log q|"""
    ratio: float
    """mean of p / q"""
    kl: float
    """k3 estimate of KL(q || p): mean of p / q - 1 - log(p / q)"""


class EvaluationMetrics(RolloutMetrics):
    """Held-out problems, at the training's sampling."""

    step: int
    """finished steps when it was made"""
    version: int
    seconds: float


class StepMetrics(RolloutMetrics, MismatchMetrics):
    step: int
    """from 1"""
    version: int
    """weight version that sampled the step's rollouts"""
    zero_variance_groups: int
    """groups whose completions all have the same reward"""
    entropy: float
    """mean over tokens, in nats"""
    z: float
    """losslessness of the step's tokens; a correct sampler gives a standard normal"""
    z_running: float
    """of all steps' tokens"""
    loss: float
    grad_norm: float
    clip_fraction: float
    policy_ratio: float
    """new policy to old, while training on the step"""
    policy_kl: float
    """from the old policy to the new"""
    reference_kl: float
    learning_rate: float
    tokens_per_second: float
    """of generation"""
    stages: dict[Stage, float]
    """seconds of each"""
    seconds: float
    """of the whole step"""


@dataclass(frozen=True)
class GradedGroup:
    group: Group
    rewards: list[float]
    """one a completion"""

    @property
    def rollouts(self) -> list[Rollout]:
        return [Rollout(self.group.prompt_token_ids, c.token_ids, c.logprobs) for c in self.group.completions]


def rollout_metrics(batch: Sequence[GradedGroup], pass_threshold: float) -> RolloutMetrics:
    completions = [completion for graded in batch for completion in graded.group.completions]
    rewards = np.array([reward for graded in batch for reward in graded.rewards])
    lengths = [len(completion.token_ids) for completion in completions]
    acceptance = accepted_drafts(completions)
    return RolloutMetrics(
        reward=rewards.mean(),
        reward_std=rewards.std(),
        pass_rate=(rewards >= pass_threshold).mean(),
        response_length=float(np.mean(lengths)),
        truncated=float(np.mean([completion.finish_reason == "length" for completion in completions])),
        tokens=sum(lengths),
        draft_steps=acceptance.steps,
        accepted=acceptance.accepted,
        acceptance_length=acceptance.length if acceptance.steps else None,
    )


def accepted_drafts(completions: Sequence[Completion]) -> Acceptance:
    records = [completion.speculation for completion in completions if completion.speculation is not None]
    return total(Acceptance(record.drafted, record.accepted_histogram) for record in records)


def mismatch_metrics(rollouts: Sequence[Rollout], scores: TokenScores) -> MismatchMetrics:
    """`scores` of all the rollouts' tokens, in their order."""
    trainer = scores.sampled_logprobs.double()
    rollout = torch.tensor([logprob for r in rollouts for logprob in r.logprobs], dtype=torch.float64)
    log_ratio = trainer - rollout
    return MismatchMetrics(
        logprob_difference_max=log_ratio.abs().max().item(),
        logprob_difference=log_ratio.abs().mean().item(),
        ratio=log_ratio.exp().mean().item(),
        kl=(log_ratio.exp() - 1.0 - log_ratio).mean().item(),
    )
