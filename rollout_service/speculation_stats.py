"""Speculation counts of one engine by weight version, fed by vLLM's own statistics after every step."""

from typing import Any, NamedTuple

from vllm.v1.metrics.loggers import StatLoggerBase

from drafters.acceptance import Acceptance, by_context_length


class Versions(NamedTuple):
    policy: int
    drafter: int


class SpeculationCounts(StatLoggerBase):
    """vLLM's per-step statistics, summed under the versions that the engine held when they arrived."""

    def __init__(self, versions: Versions):
        self.versions = versions
        self.by_version: dict[Versions, dict[str, Any]] = {}
        self.by_context: dict[int, Acceptance] = {}

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        step = scheduler_stats and scheduler_stats.spec_decoding_stats
        if not step:
            return
        k = len(step.num_accepted_tokens_per_pos)
        zero = {"draft_steps": 0, "drafted": 0, "accepted": 0, "accepted_by_position": [0] * k}
        counts = self.by_version.setdefault(self.versions, zero)
        counts["draft_steps"] += step.num_drafts
        counts["drafted"] += step.num_draft_tokens
        counts["accepted"] += step.num_accepted_tokens
        per_position = zip(counts["accepted_by_position"], step.num_accepted_tokens_per_pos, strict=True)
        counts["accepted_by_position"] = [a + b for a, b in per_position]

    def add_contexts(self, prompt_tokens: int, steps: list[tuple[int, int]]) -> None:
        """Count a finished completion's draft steps, (drafted, accepted), by their context length."""
        for floor, acceptance in by_context_length([(prompt_tokens, steps)]).items():
            self.by_context[floor] = self.by_context.get(floor, Acceptance()) + acceptance

    def forget(self) -> None:
        """What was drafted to measure costs is nobody's acceptance."""
        self.by_version.clear()

    def log_engine_initialized(self) -> None:
        pass

    def rows(self) -> list[dict[str, Any]]:
        return [
            {"policy_version": v.policy, "drafter_version": v.drafter, **counts}
            for v, counts in self.by_version.items()
        ]
