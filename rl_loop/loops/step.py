"""The training step on a batch of graded groups: it scores the batch, weighs it, and reports it.

graded groups -> shaped rewards -> advantages -> examples (old log-probabilities, corrections) -> learner -> metrics
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from torch import Tensor

from drafters.expert_routing import Routing
from drafters.scoring import SurprisalSums, TokenScores, join_scores
from rl_loop.batching import Rollout
from rl_loop.config import TrainConfig
from rl_loop.learner.online_drafter import DrafterUpdate, OnlineDrafter, learning_drafter
from rl_loop.learner.policy_learner import Example, PolicyLearner, UpdateMetrics
from rl_loop.losses.advantages import Advantages, group_advantages
from rl_loop.losses.corrections import CorrectionMetrics, correct, staleness
from rl_loop.losses.shaping import overlong_penalty
from rl_loop.reports.drafter_metrics import drafter_metrics
from rl_loop.reports.metrics import (
    STAGES,
    GradedGroup,
    Overlap,
    Stage,
    StepMetrics,
    mismatch_metrics,
    rollout_metrics,
    router_metrics,
)
from rl_loop.reports.reporting import Reporter
from rl_loop.run.checkpoint import RunState


class StageClock:
    """The seconds of a step, by stage and in total. `announce` is called with each stage that begins."""

    def __init__(self, announce: Callable[[str], None]):
        self.announce = announce
        self.seconds: dict[Stage, float] = dict.fromkeys(STAGES, 0.0)
        self.began = time.perf_counter()

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.began

    def leave_out(self, seconds: float) -> None:
        """Do not count the last `seconds` as part of the step."""
        self.began += seconds

    @contextmanager
    def __call__(self, stage: Stage) -> Iterator[None]:
        self.announce(stage)
        started = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - started


@dataclass(frozen=True)
class StepBatch:
    """The groups that a step trains on, and what happened to the other groups that were requested."""

    graded: list[GradedGroup]
    rounds: int = 1
    """synchronous training: rounds in which `prompts_per_step` problems were drawn"""
    spent: list[str] = field(default_factory=list)
    """asynchronous training: names of groups that are acknowledged with the others, but not trained on. Their rewards
    are all equal, they lost too many completions, or they failed"""
    replaced: int = 0
    """groups that dynamic sampling left out"""
    failed: int = 0
    """groups that the service could not generate"""
    rewards_failed: int = 0
    """completions of all these groups that were left out because their reward failed"""

    @property
    def names(self) -> list[str]:
        return [g.group.id for g in self.graded] + self.spent


@dataclass(frozen=True)
class Prepared:
    """A batch that is ready for training the policy of `version`."""

    graded: list[GradedGroup]
    version: int
    rollouts: list[Rollout]
    scores: TokenScores
    """scores of all tokens under the policy before the step"""
    on_policy: SurprisalSums
    """sums over the tokens that the policy of `version` sampled; in synchronous training these are all tokens"""
    advantages: Advantages
    correction: CorrectionMetrics
    examples: list[Example]
    routing: Routing | None
    learned: DrafterUpdate
    """what the drafter learned from the batch"""


def shaped_rewards(config: TrainConfig, graded: GradedGroup) -> list[float]:
    """The group's rewards from which advantages are computed: they include the penalty for overlong responses."""
    pairs = zip(graded.rewards, graded.group.completions, strict=True)
    limit = config.sampling.max_tokens
    buffer = int(config.loss.overlong_share * limit)
    return [reward + overlong_penalty(len(c.token_ids), limit, buffer) for reward, c in pairs]


def rewards_differ(graded: GradedGroup) -> bool:
    """Whether dynamic sampling keeps the group: its rewards, before shaping, are not all equal."""
    return len(set(graded.rewards)) > 1


def prepare(
    config: TrainConfig, learner: PolicyLearner, graded: Sequence[GradedGroup], version: int, clock: StageClock,
    drafter: OnlineDrafter | None, step: int,
) -> Prepared:  # fmt: skip
    """The batch of `step`, counted from 0, for the policy of `version`. The drafter learns from the forward pass that
    scores the batch."""
    with clock("logprob"):
        rollouts = [rollout for g in graded for rollout in g.rollouts]
        completions = [completion for g in graded for completion in g.group.completions]
        with learning_drafter(drafter, step, completions) as (learned, reader):
            scores = learner.logprobs(rollouts, reader)
        routing = learner.routing()
        references = learner.reference_logprobs(rollouts)
    with clock("data"):
        advantages = group_advantages([shaped_rewards(config, g) for g in graded], config.loss.normalise_advantages)
        per_rollout = [value for group in advantages.values for value in group]
        proximal = [score.sampled_logprobs for score in scores]
        correction = correct(config.correction, rollouts, proximal, version)
        sampling = config.correction.proximal == "sampling"
        old = [
            score.logprobs.new_tensor(rollout.logprobs) if sampling else score.logprobs
            for rollout, score in zip(rollouts, scores, strict=True)
        ]
        weights: Sequence[Tensor | None] = correction.weights or [None] * len(rollouts)
        examples = list(map(Example, rollouts, per_rollout, old, references, weights))
        all_scores = join_scores(scores)
        is_async = config.mode == "async"
        on_policy = on_policy_sums(rollouts, scores, version) if is_async else SurprisalSums.of(all_scores)
        return Prepared(
            list(graded), version, rollouts, all_scores, on_policy, advantages, correction.metrics, examples, routing,
            learned,
        )  # fmt: skip


def on_policy_sums(rollouts: Sequence[Rollout], scores: Sequence[TokenScores], version: int) -> SurprisalSums:
    fresh = [staleness(rollout, version) == 0 for rollout in rollouts]
    kept = [
        TokenScores(s.logprobs[f], s.sampled_logprobs[f], s.entropy[f], s.variance[f])
        for s, f in zip(scores, fresh, strict=True)
    ]
    return SurprisalSums.of(join_scores(kept))


def step_metrics(
    config: TrainConfig,
    prepared: Prepared,
    batch: StepBatch,
    update: UpdateMetrics,
    clock: StageClock,
    overlap: Overlap,
    state: RunState,
) -> StepMetrics:
    """The metrics of the step. `state` is the state after it."""
    seconds = clock.elapsed
    of_rollouts = rollout_metrics(prepared.graded, config.task.pass_threshold)
    ages = prepared.correction.staleness
    return StepMetrics(
        **of_rollouts.model_dump(),
        **mismatch_metrics(prepared.rollouts, prepared.scores).model_dump(),
        **update.model_dump(),
        **asdict(prepared.correction),
        **overlap.model_dump(),
        **router_metrics(prepared.routing).model_dump(),
        step=state.step,
        version=prepared.version,
        staleness_mean=sum(age * tokens for age, tokens in enumerate(ages)) / sum(ages),
        zero_variance_groups=prepared.advantages.zero_variance_groups,
        groups_replaced=batch.replaced,
        groups_failed=batch.failed,
        rewards_failed=batch.rewards_failed,
        entropy=prepared.scores.entropy.mean().item(),
        z=prepared.on_policy.z,
        z_running=state.losslessness.z,
        tokens_per_second=of_rollouts.tokens / (seconds if config.mode == "async" else clock.seconds["generation"]),
        stages=clock.seconds,
        seconds=seconds,
    )


def report_drafter(drafter: OnlineDrafter | None, prepared: Prepared, step: int, reporter: Reporter) -> None:
    """Keep what the drafter learned, and report it. `step`: the finished step, counted from 1."""
    if drafter is not None:
        drafter.finish_step()
    earlier = reporter.log.drafter
    reporter.drafter(drafter_metrics(earlier, prepared.graded, step, prepared.version, prepared.learned))
