"""Measured in a running engine: the seconds of a decoding step by batch size and draft length, and acceptance.

A step's time is that between the arrivals of two steps' statistics in the process in front of vLLM's core: what the
user of the engine waits for, scheduling and the hand-over of tokens included. Only steps are counted in which all the
completions asked for decode with the draft length asked for, and which follow such a step.
"""

import asyncio
import time
import uuid
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pydantic import BaseModel
from scipy.stats import trim_mean
from vllm.v1.metrics.loggers import StatLoggerBase

if TYPE_CHECKING:
    from vllm import SamplingParams

from drafters.schedule import StepCosts

WARM_UP_TOKENS = 16
UNCOUNTED = 5
"""steps of a batch that begins: prompts come in a few steps, and the first decoding step follows none of its kind"""


class StepKind(NamedTuple):
    batch: int
    drafts: int
    """of each completion"""


class Plan(BaseModel):
    """What to measure: every draft length at every batch size."""

    prompts: list[list[int]]
    """token ids; taken in turn"""
    batch_sizes: list[int]
    draft_lengths: list[int] | None
    """None for an engine without a drafter, which is measured as draft length 0"""
    steps: int
    """of each batch size and draft length, at least"""
    warm_up: bool = True
    """the engine's first steps compile and allocate: generate a little before"""
    responses: int = 0
    """completions, ended as the policy ends them, whose acceptance is counted with the longest drafts"""
    response_tokens: int = 256
    """the longest of them"""
    temperature: float = 1.0


@dataclass
class Measured:
    """Sums of one or several plans."""

    seconds: dict[StepKind, list[float]] = field(default_factory=lambda: defaultdict(list))
    first: dict[StepKind, list[float]] = field(default_factory=lambda: defaultdict(list))
    """from the prompts' arrival to the end of the first step of a kind"""
    drafted: list[int] = field(default_factory=list)
    """completions with a draft at each position, over all steps"""
    accepted: list[int] = field(default_factory=list)
    """of them, those that accepted it and all before"""

    def add(self, other: "Measured") -> None:
        for kind, seconds in other.seconds.items():
            self.seconds[kind] += seconds
        for kind, seconds in other.first.items():
            self.first[kind] += seconds
        self.drafted = _sum(self.drafted, other.drafted)
        self.accepted = _sum(self.accepted, other.accepted)

    def reached(self, batch_sizes: Sequence[int], draft_lengths: Sequence[int]) -> list[int]:
        """The batch sizes of which every draft length was seen: a KV cache may be too small for the larger ones."""
        return [b for b in batch_sizes if all(StepKind(b, k) in self.seconds for k in draft_lengths)]

    def costs(self, batch_sizes: Sequence[int], draft_tokens: int) -> StepCosts:
        lengths = range(draft_tokens + 1)
        reached = self.reached(batch_sizes, lengths)
        seconds, first = (
            [[_usual(of[StepKind(b, k)]) for b in reached] for k in lengths] for of in (self.seconds, self.first)
        )
        return StepCosts(batch_sizes=reached, seconds=seconds, first=first)

    @property
    def acceptance(self) -> list[float]:
        return [a / d if d else 0.0 for a, d in zip(self.accepted, self.drafted, strict=True)]


def fastest(passes: Sequence[StepCosts]) -> StepCosts:
    """The least of each cost: what else a machine does makes steps slower, never faster. Batch sizes are those that
    every pass reached."""
    sizes = [b for b in passes[0].batch_sizes if all(b in costs.batch_sizes for costs in passes)]

    def least(name: str) -> list[list[float]]:
        return np.min(
            [np.array(getattr(c, name))[:, [c.batch_sizes.index(b) for b in sizes]] for c in passes], axis=0
        ).tolist()

    return StepCosts(batch_sizes=sizes, seconds=least("seconds"), first=least("first"))


def _usual(seconds: Sequence[float]) -> float:
    """The mean of the middle half; of three, of all: one step looks long and the next short when the process in front
    was late for the first."""
    return float(trim_mean(seconds, 0.25))


def _sum(some: list[int], others: list[int]) -> list[int]:
    return [a + b for a, b in zip(some, others, strict=True)] if some and others else some or others


class StepTimes(StatLoggerBase):
    """Fed by vLLM after every step; counts while `measured` is set."""

    def __init__(self) -> None:
        self.measured: Measured | None = None
        self.arrival: float | None = None
        """of prompts whose first step has not been seen"""
        self.enough = asyncio.Event()
        """as many steps of a kind were counted as were asked for"""
        self._asked: StepKind | None = None
        """prompts may come a few at a time: meanwhile there are steps of fewer completions, which nobody asked for"""
        self._steps = 0
        self._before: tuple[StepKind | None, float] = None, 0.0

    def ask(self, kind: StepKind, steps: int) -> None:
        """Of prompts that arrive now: set `enough` once so many steps are counted."""
        self.arrival, self._asked, self._steps = time.perf_counter(), kind, steps
        self.enough.clear()

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        if self.measured is None or scheduler_stats is None or iteration_stats is None:
            return
        now, kind, before = time.perf_counter(), step_kind(scheduler_stats, iteration_stats), self._before
        if kind is not None and kind == self._asked:
            if kind == before[0]:
                self.measured.seconds[kind].append(now - before[1])
                if len(self.measured.seconds[kind]) == self._steps:
                    self.enough.set()
            elif self.arrival is not None:
                self.measured.first[kind].append(now - self.arrival)
                self.arrival = None
        self._before = kind, now
        if drafts := scheduler_stats.spec_decoding_stats:
            self.measured.drafted = _sum(self.measured.drafted, drafts.num_draft_tokens_per_pos)
            self.measured.accepted = _sum(self.measured.accepted, drafts.num_accepted_tokens_per_pos)

    def log_engine_initialized(self) -> None:
        pass


def step_kind(scheduler_stats: Any, iteration_stats: Any) -> StepKind | None:
    """None for steps with a prompt in them, and with draft lengths that differ."""
    running, drafts = scheduler_stats.num_running_reqs, scheduler_stats.spec_decoding_stats
    if not running or iteration_stats.num_prompt_tokens:
        return None
    if drafts is None:
        return StepKind(running, 0) if iteration_stats.num_generation_tokens == running else None
    length = drafts.num_draft_tokens // running
    alike = drafts.num_drafts == running and drafts.num_draft_tokens == length * running
    return StepKind(running, length) if alike else None


async def set_draft_lengths(llm: Any, ranges: Sequence[tuple[int, int, int]]) -> None:
    """Change the schedule of a running engine."""
    await llm.engine_core.call_utility_async("set_draft_lengths", [list(entry) for entry in ranges])


def tokens_of_steps(steps: int, drafts: int) -> int:
    """The longest that a response may become until so many steps are counted: a step yields drafts + 1 tokens at most,
    and UNCOUNTED steps are not."""
    return (steps + UNCOUNTED) * (drafts + 1)


async def measure_steps(llm: Any, times: StepTimes, plan: Plan) -> Measured:
    """Run the plan on an engine that does nothing else; its schedule is then drafts of the longest length."""
    largest, lengths = max(plan.batch_sizes), plan.draft_lengths or [0]
    if plan.warm_up:
        await _generate(llm, plan, largest, WARM_UP_TOKENS)
    times.measured = timed = Measured()
    try:
        for batch in plan.batch_sizes:
            for drafts in lengths:
                if plan.draft_lengths is not None:
                    await set_draft_lengths(llm, [(1, largest, drafts)])
                times.ask(StepKind(batch, drafts), plan.steps)
                await _generate(llm, plan, batch, tokens_of_steps(plan.steps, drafts), until=times.enough)
        # What is drafted past the end of a response says nothing of responses.
        times.measured = counted = Measured()
        await _generate(llm, plan, plan.responses, plan.response_tokens, to_the_end=True)
    finally:
        times.measured = None
    return Measured(timed.seconds, timed.first, counted.drafted, counted.accepted)


async def _generate(
    llm: Any, plan: Plan, completions: int, tokens: int, to_the_end: bool = False, until: asyncio.Event | None = None
) -> None:
    """So many completions at a time, of so many tokens unless they may end before, or are aborted when `until` is
    set."""
    sampling = _sampling(tokens, plan.temperature, to_the_end)
    names = [f"measure-{uuid.uuid4().hex}" for _ in range(completions)]

    async def one(i: int, name: str) -> None:
        async for _ in llm.generate({"prompt_token_ids": plan.prompts[i % len(plan.prompts)]}, sampling, name):
            pass

    generating = asyncio.gather(*(one(i, name) for i, name in enumerate(names)))
    if until is not None:
        waiting: asyncio.Future[Any] = asyncio.ensure_future(until.wait())
        await asyncio.wait([generating, waiting], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        await llm.abort(names)
        await llm.get_weight_version()  # answered after the step under way, which slows what comes next, on any engine
    await generating


def _sampling(tokens: int, temperature: float, to_the_end: bool) -> "SamplingParams":
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=temperature,
        max_tokens=tokens,
        ignore_eos=not to_the_end,
        logprobs=0,
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
