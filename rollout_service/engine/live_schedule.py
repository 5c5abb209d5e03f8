"""The schedule of draft lengths in use in one engine: where it came from, and how it follows acceptance."""

from collections.abc import Callable
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

from drafters.drafter import DrafterConfig
from drafters.registry import make_drafter
from drafters.schedule import (
    AcceptanceEstimate,
    LiveSchedule,
    Range,
    StepCosts,
    to_drafts,
    tokens_per_second,
)
from rollout_service.protocol import DraftSchedule, ScheduleSource

UNKNOWN = 0.8
"""acceptance of a draft given those before it, of a drafter that has not drafted yet: high, to give it its chance"""
WEIGHT_UNKNOWN, WEIGHT_CALIBRATED = 20.0, 500.0
"""drafts as which what was known before counts beside what is observed"""


class DraftLengths(StatLoggerBase):
    """Fed by vLLM after every step. `apply` puts another schedule in place."""

    def __init__(self, config: DrafterConfig, batches: int):
        """`batches` is the largest batch size."""
        self.config, self.batches = config, batches
        self.apply: Callable[[list[Range]], None] = lambda ranges: None
        self.live: LiveSchedule | None = None
        if (calibration := config.calibration()) is not None:
            estimate = AcceptanceEstimate(calibration.acceptance, WEIGHT_CALIBRATED)
            self.live = LiveSchedule(calibration.costs, estimate, batches)

    @property
    def is_measured_at_start(self) -> bool:
        """Random prompts hold nothing that n-grams could find: what their drafts cost is not known at the start."""
        return self.config.schedule == "auto" and make_drafter(self.config).samples

    @property
    def ranges(self) -> list[Range]:
        if self.live is not None:
            return self.live.ranges
        given = self.config.schedule
        return given if isinstance(given, list) else [(1, self.batches, self.config.draft_tokens)]

    def measured(self, costs: StepCosts) -> None:
        """From now on by the clock."""
        unknown = [UNKNOWN**i for i in range(1, costs.draft_tokens + 1)]
        self.live = LiveSchedule(costs, AcceptanceEstimate(unknown, WEIGHT_UNKNOWN), self.batches)
        self.apply(self.live.ranges)

    def new_drafter(self) -> None:
        """Other weights draft from now on: what they are worth is to be seen."""
        if self.live is not None and self.live.start_over():
            self.apply(self.live.ranges)

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        drafts = scheduler_stats and scheduler_stats.spec_decoding_stats
        if not drafts or self.live is None:
            return
        if self.live.observe(drafts.num_draft_tokens_per_pos, drafts.num_accepted_tokens_per_pos):
            self.apply(self.live.ranges)

    def log_engine_initialized(self) -> None:
        pass

    def status(self, engine: int) -> DraftSchedule:
        source: ScheduleSource = "fixed"
        if isinstance(self.config.schedule, list):
            source = "ranges"
        elif self.live is not None:
            source = "auto" if self.config.schedule == "auto" else "file"
        common: dict[str, Any] = {"engine": engine, "source": source, "ranges": self.ranges}
        if self.live is None:
            return DraftSchedule(**common, reason="as configured in drafter.schedule")
        costs, acceptance = self.live.costs, self.live.acceptance.by_position
        drafts = to_drafts(self.ranges, max(self.batches, *costs.batch_sizes))
        gains = {
            b: tokens_per_second(costs, acceptance, b, drafts[b - 1]) / tokens_per_second(costs, acceptance, b, 0)
            for b in costs.batch_sizes
        }
        origin = "measured when the engine started" if source == "auto" else "of the calibration"
        rates = " ".join(f"{a:.2f}" for a in acceptance)
        reason = (
            f"the most tokens per second, from step costs {origin} and acceptance {rates} by position after "
            f"{self.live.acceptance.drafts} drafts of this drafter; changed {self.live.changes} times since the start"
        )
        return DraftSchedule(
            **common, acceptance_by_position=acceptance, gains=gains, changes=self.live.changes, reason=reason
        )
