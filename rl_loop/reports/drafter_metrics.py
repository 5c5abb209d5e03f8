"""Drafter metrics of a step: acceptance by position and by context length, versions, age, and training."""

from collections.abc import Sequence

from pydantic import BaseModel

from drafters.acceptance import by_context_length
from rl_loop.learner.online_drafter import DrafterUpdate
from rl_loop.reports.metrics import GradedGroup, accepted_drafts


class AcceptanceAtLength(BaseModel):
    """Draft steps that began with a context of at least `from_tokens` tokens and fewer than twice as many."""

    from_tokens: int
    draft_steps: int
    accepted: int
    acceptance_length: float


class DrafterMetrics(BaseModel):
    """One line of drafter.jsonl. Ratios are ratios of sums over the step's completions."""

    step: int
    """counted from 1"""
    policy_version: int
    """version of the policy that the step trains"""
    drafter_version: int
    """newest version of the drafter that drafted the step's rollouts"""
    drafter_age: int
    """policy versions since the drafter's last update"""
    draft_steps: int
    drafted: int
    accepted: int
    acceptance_length: float
    acceptance_rate: float
    acceptance_by_position: list[float]
    by_context_length: list[AcceptanceAtLength]
    updates: int
    """optimiser updates of the drafter in this step; 0 if it was not trained"""
    loss: float | None
    """mean over these updates"""
    grad_norm: float | None
    """mean over these updates, before clipping"""
    seconds: float
    """seconds of the drafter's training, which is part of the stage logprob"""

    def scalars(self) -> dict[str, float]:
        values = self.model_dump(exclude={"step", "acceptance_by_position", "by_context_length"}, exclude_none=True)
        at = {f"accepted_at_{i}": share for i, share in enumerate(self.acceptance_by_position, start=1)}
        return values | at


def drafter_metrics(
    earlier: Sequence[DrafterMetrics], graded: Sequence[GradedGroup], step: int, version: int, update: DrafterUpdate
) -> DrafterMetrics | None:
    """The metrics of one step whose policy has `version`, or None without a drafter. The drafter's age is counted from
    the `earlier` steps."""
    completions = [(g.group.prompt_token_ids, c) for g in graded for c in g.group.completions if c.speculation]
    acceptance = accepted_drafts([completion for _, completion in completions])
    if not acceptance.steps:
        return None
    drafter_version = max(c.speculation.drafter_version for _, c in completions if c.speculation)
    since = [m.policy_version for m in earlier if m.drafter_version == drafter_version]
    contexts = by_context_length((len(prompt), c.speculation.steps or []) for prompt, c in completions)  # type: ignore[union-attr]
    return DrafterMetrics(
        step=step,
        policy_version=version,
        drafter_version=drafter_version,
        drafter_age=version - min(since, default=version),
        draft_steps=acceptance.steps,
        drafted=acceptance.drafted,
        accepted=acceptance.accepted,
        acceptance_length=acceptance.length,
        acceptance_rate=acceptance.rate,
        acceptance_by_position=acceptance.by_position,
        by_context_length=[
            AcceptanceAtLength(from_tokens=tokens, draft_steps=a.steps, accepted=a.accepted, acceptance_length=a.length)
            for tokens, a in sorted(contexts.items())
        ],
        updates=len(update.losses),
        loss=sum(update.losses) / len(update.losses) if update.losses else None,
        grad_norm=sum(update.grad_norms) / len(update.grad_norms) if update.grad_norms else None,
        seconds=update.seconds,
    )
