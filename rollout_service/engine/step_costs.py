"""Step costs: seconds of a decoding step by batch size and draft length, and acceptance, from vLLM's statistics.

A step's time is the time between the arrivals of two steps' statistics in the process in front of vLLM's core. It is
what the user of the engine waits for, scheduling and the hand-over of tokens included. A step counts only if all the
completions asked for decode in it, with the draft length asked for, and if the step before was such a step too.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import trim_mean
from vllm.v1.metrics.loggers import StatLoggerBase

from drafters.schedule import StepCosts

TRIMMED = 0.25
"""share of the shortest steps that the mean leaves out, and of the longest"""
ERROR = 0.01
"""relative standard error of a cost that is exact enough"""
TRUSTED = 12
"""least number of steps whose standard error is trusted"""
LONGEST = 0.3
"""seconds of one kind's steps after which no more are measured, however much they differ"""


class StepKind(NamedTuple):
    batch: int
    drafts: int
    """draft tokens of each completion"""


@dataclass
class Measured:
    """What was measured by one or several plans."""

    seconds: dict[StepKind, list[float]] = field(default_factory=lambda: defaultdict(list))
    first: dict[StepKind, list[float]] = field(default_factory=lambda: defaultdict(list))
    """seconds from the prompts' arrival to the end of the first step of a kind"""
    drafted: list[int] = field(default_factory=list)
    """completions with a draft at each position, over all steps"""
    accepted: list[int] = field(default_factory=list)
    """those of them that accepted this draft and all before it"""

    def add(self, other: "Measured") -> None:
        for kind, seconds in other.seconds.items():
            self.seconds[kind] += seconds
        for kind, seconds in other.first.items():
            self.first[kind] += seconds
        self.drafted = _sum(self.drafted, other.drafted)
        self.accepted = _sum(self.accepted, other.accepted)

    def reached(self, batch_sizes: Sequence[int], draft_lengths: Sequence[int]) -> list[int]:
        """The batch sizes at which every draft length was seen. A KV cache may be too small for the larger ones."""
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
    """The least of each cost, because other work of the machine makes steps slower, never faster. Batch sizes are those
    that every pass reached."""
    sizes = [b for b in passes[0].batch_sizes if all(b in costs.batch_sizes for costs in passes)]

    def least(name: str) -> list[list[float]]:
        return np.min(
            [np.array(getattr(c, name))[:, [c.batch_sizes.index(b) for b in sizes]] for c in passes], axis=0
        ).tolist()

    return StepCosts(batch_sizes=sizes, seconds=least("seconds"), first=least("first"))


def _usual(seconds: Sequence[float]) -> float:
    """The mean of the middle half, or of all if there are three. One step looks long and the next short when the
    process in front was late for the first."""
    return float(trim_mean(seconds, TRIMMED))


def standard_error(seconds: Sequence[float]) -> float:
    """The relative standard error of `_usual` (Tukey and McLaughlin, 1963): that of a mean in which the times that are
    left out are replaced by the nearest that count, over the share that counts."""
    ordered, cut = np.sort(seconds), int(TRIMMED * len(seconds))
    ordered = ordered.clip(ordered[cut], ordered[-1 - cut])
    counted = 1.0 - 2.0 * cut / len(ordered)
    return float(ordered.std(ddof=1) / (counted * np.sqrt(len(ordered)) * _usual(seconds)))


def _sum(some: list[int], others: list[int]) -> list[int]:
    return [a + b for a, b in zip(some, others, strict=True)] if some and others else some or others


class StepTimes(StatLoggerBase):
    """vLLM calls `record` after every step. Steps count while `measured` is set."""

    def __init__(self) -> None:
        self.measured: Measured | None = None
        self.arrival: float | None = None
        """time of arrival of prompts whose first step has not been seen"""
        self.enough = asyncio.Event()
        """set when as many steps of a kind were counted as were asked for"""
        self._asked: StepKind | None = None
        """prompts may come a few at a time, and steps of fewer completions are not counted meanwhile"""
        self._steps = 0
        self._precisely = False
        self._before: tuple[StepKind | None, float] = None, 0.0

    def ask(self, kind: StepKind, steps: int, precisely: bool = False) -> None:
        """Count the steps of prompts that arrive now, and set `enough` once there are so many of this kind.

        `precisely`: and once their cost has a standard error below ERROR, or they took LONGEST.
        """
        self.arrival, self._asked, self._steps, self._precisely = time.perf_counter(), kind, steps, precisely
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
                if self._are_enough(self.measured.seconds[kind]):
                    self.enough.set()
            elif self.arrival is not None:
                self.measured.first[kind].append(now - self.arrival)
                self.arrival = None
        self._before = kind, now
        if drafts := scheduler_stats.spec_decoding_stats:
            self.measured.drafted = _sum(self.measured.drafted, drafts.num_draft_tokens_per_pos)
            self.measured.accepted = _sum(self.measured.accepted, drafts.num_accepted_tokens_per_pos)

    def _are_enough(self, seconds: list[float]) -> bool:
        if len(seconds) < self._steps:
            return False
        if not self._precisely or sum(seconds) >= LONGEST:
            return True
        return len(seconds) >= TRUSTED and standard_error(seconds) < ERROR

    def log_engine_initialized(self) -> None:
        pass


def step_kind(scheduler_stats: Any, iteration_stats: Any) -> StepKind | None:
    """The kind of a step; None for a step that processes a prompt, or in which draft lengths differ."""
    running, drafts = scheduler_stats.num_running_reqs, scheduler_stats.spec_decoding_stats
    if not running or iteration_stats.num_prompt_tokens:
        return None
    if drafts is None:
        return StepKind(running, 0) if iteration_stats.num_generation_tokens == running else None
    length = drafts.num_draft_tokens // running
    alike = drafts.num_drafts == running and drafts.num_draft_tokens == length * running
    return StepKind(running, length) if alike else None
