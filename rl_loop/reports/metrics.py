"""Metrics of a step and of an evaluation: their types, and how they are computed from rollouts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from pydantic import BaseModel, Field

from drafters.acceptance import Acceptance, total
from drafters.expert_routing import Routing
from drafters.scoring import TokenScores
from rl_loop.batching import Rollout
from rl_loop.learner.policy_learner import UpdateMetrics
from rollout_service.protocol import Completion, Group

FIELDS_WITHOUT_A_CURVE = {"step", "stages", "staleness", "router_entropy", "expert_load"}

Stage = Literal["data", "prepare", "generation", "logprob", "train"]
STAGES: tuple[Stage, ...] = get_args(Stage)


class RolloutMetrics(BaseModel):
    """Metrics of the completions of one batch."""

    reward: float
    """mean reward"""
    reward_std: float
    pass_rate: float
    """share of right responses"""
    response_length: float
    """mean number of tokens"""
    truncated: float
    """share of responses that max_tokens ended"""
    tokens: int
    """tokens of all responses"""
    draft_steps: int
    accepted: int
    """accepted draft tokens"""
    acceptance_length: float | None
    """accepted / draft_steps + 1; None without a drafter"""


class MismatchMetrics(BaseModel):
    """Mismatch between the trainer's probabilities p and the rollout's q of the same tokens. Without any mismatch, the
    four values are 0, 0, 1 and 0."""

    logprob_difference_max: float
    """largest |log p - log q|"""
    logprob_difference: float
    """mean of |log p - log q|"""
    ratio: float
    """mean of p / q"""
    kl: float
    """k3 estimate of KL(q || p): mean of p / q - 1 - log(p / q)"""


class EvaluationMetrics(RolloutMetrics):
    """Metrics of held-out problems, sampled as in training."""

    step: int
    """finished steps when the evaluation began"""
    version: int
    seconds: float


class OffPolicyMetrics(BaseModel):
    """How far the policies that sampled a step's tokens are from the policy that trains on them."""

    staleness: list[int] = Field(default_factory=list)
    """number of tokens that are 0, 1, 2, ... versions older than the trained policy"""
    staleness_mean: float = 0.0
    importance_ratio: float = 1.0
    """mean over tokens of the ratio of the policy before the step to the policy that sampled the token"""
    effective_sample_size: float = 1.0
    """effective sample size of these ratios, as a share of the tokens"""
    masked: float = 0.0
    """share of tokens that the correction leaves out"""


class Overlap(BaseModel):
    """How long the learner and the engines waited during a step."""

    exposed_generation: float = 0.0
    """seconds that the learner waited for rollouts"""
    learner_idle: float = 0.0
    """seconds that the learner waited, for rollouts or for new weights to be in service"""
    engines_idle: float | None = None
    """seconds that an engine had nothing to generate, mean over engines; None if not known"""
    tokens_wasted: int = 0
    """tokens thrown away since the trainer was started: dropped as too old, or aborted"""


class RouterMetrics(BaseModel):
    """How the policy before the step chooses experts, over the tokens from which response tokens are predicted. Layers
    are those that have a router, from the first. Without experts, or with routers that are not known, all are empty."""

    router_loss: float | None = None
    """load-balancing loss: K if all experts are chosen alike, and the number of experts if always the same K are, where
    K is the number of experts that a token chooses"""
    router_entropy: list[float] = Field(default_factory=list)
    """by layer: entropy of the router's probabilities, mean over tokens, in nats"""
    expert_load: list[list[float]] = Field(default_factory=list)
    """by layer and expert: the share of the layer's choices that fell on the expert; in each layer they add up to 1"""

    def router_curves(self) -> dict[str, float]:
        """By layer, counted from 0: the entropy, and the least and the most load as multiples of an equal share."""
        curves: dict[str, float] = {}
        for layer, (entropy, loads) in enumerate(zip(self.router_entropy, self.expert_load, strict=True)):
            curves |= {
                f"entropy/layer_{layer}": entropy,
                f"least_load/layer_{layer}": min(loads) * len(loads),
                f"most_load/layer_{layer}": max(loads) * len(loads),
            }
        return curves


class StepMetrics(RolloutMetrics, MismatchMetrics, OffPolicyMetrics, Overlap, RouterMetrics, UpdateMetrics):
    step: int
    """counted from 1"""
    version: int
    """version of the policy that the step trains; in synchronous training it sampled the step's rollouts too"""
    zero_variance_groups: int
    """groups whose completions all have the same reward"""
    groups_replaced: int = 0
    """groups that dynamic sampling replaced because their rewards were all equal"""
    groups_failed: int = 0
    """groups that the service could not generate; they are left out, and replaced in asynchronous training"""
    rewards_failed: int = 0
    """completions left out because their reward raised, took too long or was not a finite number"""
    entropy: float
    """mean over tokens, in nats"""
    z: float
    """surprisal z of the step's tokens that the trained policy sampled; about standard normal if all is right"""
    z_running: float
    """the same over all steps so far"""
    tokens_per_second: float
    """tokens per second of generation; in asynchronous training, per second of the whole step"""
    stages: dict[Stage, float]
    """seconds of each stage"""
    seconds: float
    """seconds of the whole step"""


@dataclass(frozen=True)
class GradedGroup:
    group: Group
    rewards: list[float]
    """one per completion"""
    failed: int = 0
    """completions left out because their rewards failed"""

    @classmethod
    def of(cls, group: Group, rewards: Sequence[float | None]) -> "GradedGroup":
        """The group without the completions whose reward is None, which means that it failed."""
        pairs = [pair for pair in zip(group.completions, rewards, strict=True) if pair[1] is not None]
        failed = len(rewards) - len(pairs)
        kept = group if not failed else group.model_copy(update={"completions": [c for c, _ in pairs]})
        return cls(kept, [reward for _, reward in pairs if reward is not None], failed)

    @property
    def rollouts(self) -> list[Rollout]:
        return [
            Rollout(
                self.group.prompt_token_ids,
                c.token_ids,
                c.logprobs,
                token_versions(c),
                None if c.routed_experts is None else c.routed_experts.array(),
            )
            for c in self.group.completions
        ]


def token_versions(completion: Completion) -> list[int]:
    """The weight version that sampled each token."""
    return [span.version for span in completion.weight_versions for _ in range(span.start, span.end)]


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


def router_metrics(routing: Routing | None) -> RouterMetrics:
    if routing is None:
        return RouterMetrics()
    loads = [[round(load, 6) for load in of_layer] for of_layer in routing.load_LE.tolist()]
    return RouterMetrics(router_loss=routing.loss, router_entropy=routing.entropy_L.tolist(), expert_load=loads)


def mismatch_metrics(rollouts: Sequence[Rollout], scores: TokenScores) -> MismatchMetrics:
    """`scores`: of all the rollouts' tokens, in the order of the rollouts."""
    trainer = scores.sampled_logprobs.double()
    rollout = torch.tensor([logprob for r in rollouts for logprob in r.logprobs], dtype=torch.float64)
    log_ratio = trainer - rollout
    return MismatchMetrics(
        logprob_difference_max=log_ratio.abs().max().item(),
        logprob_difference=log_ratio.abs().mean().item(),
        ratio=log_ratio.exp().mean().item(),
        kl=(log_ratio.exp() - 1.0 - log_ratio).mean().item(),
    )
