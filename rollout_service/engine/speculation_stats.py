"""Speculation counts of one engine by weight version, from vLLM's own statistics after every step.

The newest VERSIONS_KEPT pairs of versions have counts of their own. The counts of older pairs are one sum. So totals
stay exact, and a run of many versions takes no more memory and time than a short one.
"""

from collections.abc import Callable
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

from drafters.acceptance import Acceptance, by_context_length
from rollout_service.engine.loading import Versions

VERSIONS_KEPT = 64
"""pairs of policy and drafter version that are counted apart"""


class SpeculationCounts(StatLoggerBase):
    """vLLM's per-step statistics, summed under the versions that the engine held when they arrived."""

    def __init__(self, held: Callable[[], Versions]):
        """`held` returns the versions that the engine holds now."""
        self.held = held
        self.by_version: dict[Versions, dict[str, Any]] = {}
        """oldest first, because versions only grow"""
        self.older: dict[str, Any] | None = None
        self.by_context: dict[int, Acceptance] = {}

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        step = scheduler_stats and scheduler_stats.spec_decoding_stats
        if not step:
            return
        more = {
            "draft_steps": step.num_drafts,
            "drafted": step.num_draft_tokens,
            "accepted": step.num_accepted_tokens,
            "accepted_by_position": list(step.num_accepted_tokens_per_pos),
        }
        versions = self.held()
        self.by_version[versions] = _sum(self.by_version.get(versions), more)
        if len(self.by_version) > VERSIONS_KEPT:
            self.older = _sum(self.older, self.by_version.pop(next(iter(self.by_version))))

    def add_contexts(self, prompt_tokens: int, steps: list[tuple[int, int]]) -> None:
        """Count a finished completion's draft steps, (drafted, accepted), by their context length."""
        for floor, acceptance in by_context_length([(prompt_tokens, steps)]).items():
            self.by_context[floor] = self.by_context.get(floor, Acceptance()) + acceptance

    def forget(self) -> None:
        """Forget the counts so far, of drafts that were made to measure costs."""
        self.by_version.clear()
        self.older = None

    def log_engine_initialized(self) -> None:
        pass

    def rows(self) -> list[dict[str, Any]]:
        """One row for each pair of versions, and one for all older pairs, whose versions are None."""
        rows = [
            {"policy_version": v.policy, "drafter_version": v.drafter, **counts}
            for v, counts in self.by_version.items()
        ]
        older = [{"policy_version": None, "drafter_version": None, **self.older}] if self.older else []
        return older + rows


def _sum(counts: dict[str, Any] | None, more: dict[str, Any]) -> dict[str, Any]:
    if counts is None:
        return more
    per_position = zip(counts["accepted_by_position"], more["accepted_by_position"], strict=True)
    sums = {key: counts[key] + more[key] for key in ("draft_steps", "drafted", "accepted")}
    return sums | {"accepted_by_position": [a + b for a, b in per_position]}
