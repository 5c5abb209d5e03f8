"""DraftLengths: the one owner of how many tokens an engine drafts at each batch size.

What vLLM looks up is changed here and nowhere else, so that `ranges` is always what it finds:

    followed   chosen by the rule of drafters/schedule.py, again whenever acceptance has moved
    given      in `drafter.schedule`, or to `set`, which ends the following
    held       as a measurement asks for; the draft lengths of before come back after it
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

from drafters.registry import DrafterConfig, make_drafter
from drafters.schedule import AcceptanceEstimate, LiveSchedule, Range, StepCosts, check_ranges
from rollout_service.engine.schedule_status import given_status, live_status
from rollout_service.protocol import DraftSchedule, ScheduleSource

UNKNOWN = 0.8
"""acceptance of a draft given those before it, of a drafter that has not drafted yet: high, to give it its chance"""
WEIGHT_UNKNOWN, WEIGHT_CALIBRATED = 20.0, 500.0
"""drafts as which what was known before counts beside what is observed"""


class DraftLengths(StatLoggerBase):
    """Fed by vLLM after every step. `core` is set once the engine has started."""

    def __init__(self, config: DrafterConfig, batches: int):
        """`batches` is the largest batch size."""
        self.config, self.batches = config, batches
        self.core: Any = None
        """vLLM's client of its engine core"""
        self.running = 0
        """completions after the last step"""
        self.live: LiveSchedule | None = None
        self._source: ScheduleSource = "ranges" if isinstance(config.schedule, list) else "fixed"
        self._given = (
            config.schedule if isinstance(config.schedule, list) else [(1, self.batches, self.config.draft_tokens)]
        )
        self._held: list[Range] | None = None
        if (calibration := config.calibration()) is not None:
            self._follow("file", calibration.costs, AcceptanceEstimate(calibration.acceptance, WEIGHT_CALIBRATED))
        self.ranges = self._wanted
        """in place in vLLM, once the engine has started with them"""
        self._change = asyncio.Lock()
        self._changes: set[asyncio.Task[None]] = set()

    @property
    def is_measured_at_start(self) -> bool:
        """Random prompts hold nothing that n-grams could find: what their drafts cost is not known at the start."""
        return self.config.schedule == "auto" and make_drafter(self.config).samples

    async def measured(self, costs: StepCosts) -> None:
        """From now on by the clock."""
        unknown = [UNKNOWN**i for i in range(1, costs.draft_tokens + 1)]
        self._follow("auto", costs, AcceptanceEstimate(unknown, WEIGHT_UNKNOWN))
        await self._put_in_place()

    async def new_drafter(self) -> None:
        """Other weights draft from now on: what they are worth is to be seen."""
        if self.live is not None and self.live.start_over():
            await self._put_in_place()

    async def set(self, ranges: Sequence[Range]) -> None:
        """`ranges` from the next step on, whatever is accepted. Raises ValueError when they are wrong, or fixed."""
        self._must_be_adjustable()
        check_ranges(ranges, self.config.draft_tokens)
        self.live, self._source, self._given = None, "ranges", list(ranges)
        await self._put_in_place()

    @asynccontextmanager
    async def held(self) -> AsyncIterator[Callable[[int], Awaitable[None]]]:
        """Within, the function that is given sets the draft length of all batch sizes, and acceptance moves nothing."""

        async def hold(drafts: int) -> None:
            self._must_be_adjustable()
            self._held = [(1, self.batches, drafts)]
            await self._put_in_place()

        self._held = self.ranges
        try:
            yield hold
        finally:
            self._held = None
            await self._put_in_place()

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        if scheduler_stats is None:
            return
        self.running = scheduler_stats.num_running_reqs
        drafts = scheduler_stats.spec_decoding_stats
        if not drafts or self.live is None or self._held is not None:
            return
        if self.live.observe(drafts.num_draft_tokens_per_pos, drafts.num_accepted_tokens_per_pos):
            # This is the middle of vLLM's own handling of a step: the change follows it.
            task = asyncio.get_running_loop().create_task(self._put_in_place())
            self._changes.add(task)
            task.add_done_callback(self._changes.discard)

    def log_engine_initialized(self) -> None:
        pass

    def status(self, engine: int) -> DraftSchedule:
        """What is drafted at present, and why."""
        if self.live is None:
            configured = self._source == "fixed" or self._given == self.config.schedule
            return given_status(engine, self._source, self.ranges, self.running, configured=configured)
        return live_status(engine, self._source, self.ranges, self.running, self.live)

    @property
    def _wanted(self) -> list[Range]:
        if self._held is not None:
            return self._held
        return self.live.ranges if self.live is not None else self._given

    def _follow(self, source: ScheduleSource, costs: StepCosts, acceptance: AcceptanceEstimate) -> None:
        self._source, self.live = source, LiveSchedule(costs, acceptance, self.batches)

    def _must_be_adjustable(self) -> None:
        if self.config.schedule == "fixed":
            raise ValueError('drafter.schedule: "fixed" draft lengths cannot be set; start the engine with ranges')

    async def _put_in_place(self) -> None:
        async with self._change:  # one at a time: the last to be wanted is the last to be put in place
            wanted = self._wanted
            if wanted != self.ranges:
                await self.core.call_utility_async("set_draft_lengths", wanted)
                self.ranges = wanted
