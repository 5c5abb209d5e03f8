"""DraftLengths: the one owner of how many tokens an engine drafts at each batch size.

Only DraftLengths changes what vLLM looks up, so `ranges` is always what vLLM finds. Draft lengths are one of these:

    followed   chosen by the rule of drafters/schedule.py, again whenever acceptance has changed
    given      in `drafter.schedule`, or to `set`, after which they no longer follow acceptance
    held       as a measurement asks for; after it, the earlier draft lengths come back
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

from drafters.registry import DrafterConfig, make_drafter
from drafters.runners import Runner
from drafters.schedule import AcceptanceEstimate, LiveSchedule, Range, StepCosts, check_ranges
from rollout_service.engine.graph_sizes import every_length
from rollout_service.engine.schedule_status import given_status, live_status
from rollout_service.protocol import DraftSchedule, ScheduleSource

UNKNOWN = 0.8
"""assumed acceptance of a draft, given those before it, of a drafter that has not drafted yet; high, so that it does"""
WEIGHT_UNKNOWN, WEIGHT_CALIBRATED = 20.0, 500.0
"""number of drafts that the first estimate counts as, beside those that are observed"""


class DraftLengths(StatLoggerBase):
    """vLLM calls `record` after every step, and `started` once the engine has started."""

    core: Any
    """vLLM's client of its engine core"""

    def __init__(self, config: DrafterConfig, batches: int, runner: Runner = "v1"):
        """`batches` is the largest batch size."""
        self.config, self.batches = config, batches
        self.on_runner = make_drafter(config).on[runner]
        self.running = 0
        """completions that run after the last step"""
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
        if runner == "v2" and self.adjustable:
            self.ranges = every_length(config.draft_tokens, batches)
        self._change = asyncio.Lock()
        self._changes: set[asyncio.Task[None]] = set()

    @property
    def adjustable(self) -> bool:
        """Whether draft lengths can change while the engine runs."""
        return self.config.drafts and self.config.schedule != "fixed"

    @property
    def is_measured_at_start(self) -> bool:
        """Whether step costs are measured at the start. A drafter whose steps hold only what it finds in the text, as
        n-grams do on a CPU, is not measured, because it finds nothing in random prompts."""
        return self.config.schedule == "auto" and self.config.drafts and self.on_runner.fills

    async def started(self, core: Any) -> None:
        """vLLM's client of its core, now that the engine has started. Puts the schedule in place, if the engine started
        with another."""
        self.core = core
        await self._put_in_place()

    async def measured(self, costs: StepCosts) -> None:
        """From now on choose draft lengths by these costs."""
        unknown = [UNKNOWN**i for i in range(1, costs.draft_tokens + 1)]
        self._follow("auto", costs, AcceptanceEstimate(unknown, WEIGHT_UNKNOWN))
        await self._put_in_place()

    async def new_drafter(self) -> None:
        """Other weights draft from now on, and their acceptance is not known yet."""
        if self.live is not None and self.live.start_over():
            await self._put_in_place()

    async def set(self, ranges: Sequence[Range]) -> None:
        """Use `ranges` from the next step on, whatever is accepted. Raises ValueError when they are wrong, or when
        `drafter.schedule` is fixed."""
        self._must_be_adjustable()
        check_ranges(ranges, self.config.draft_tokens)
        self.live, self._source, self._given = None, "ranges", list(ranges)
        await self._put_in_place()

    @asynccontextmanager
    async def held(self) -> AsyncIterator[Callable[[int], Awaitable[None]]]:
        """Inside this context, acceptance changes nothing. The function that it yields sets the draft length of all
        batch sizes."""

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
            # vLLM is in the middle of handling a step, so the change comes after it.
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
        return live_status(engine, self._source, self.ranges, self.running, self.live, rests=self.on_runner.rests)

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
        async with self._change:  # one at a time, so that the last one wanted is put in place last
            wanted = self._wanted
            if wanted != self.ranges:
                await self.core.call_utility_async("set_draft_lengths", wanted)
                self.ranges = wanted
