"""Schedule of draft lengths by batch size, from the measured cost of a step and the acceptance by position.

A step of b running completions with k draft tokens each takes c(b, k) seconds. It yields b (1 + a_1 + ... + a_k)
tokens, where a_i is the probability that the first i draft tokens are all accepted. The predicted speed is their ratio.

- If no draft length is faster than no drafts by LEAST_GAIN, nothing is drafted.
- Otherwise the schedule picks the shortest draft length whose predicted speed is within TOLERANCE of the best.
- The costs c(b, k) are measured once. The acceptance a_i is followed while the engine runs, and may change the choice.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from operator import mul
from typing import Any

import numpy as np
from pydantic import BaseModel, model_validator

Range = tuple[int, int, int]
"""(smallest batch size, largest batch size, draft length): sizes are inclusive"""

LEAST_GAIN = 0.17
"""relative gain in predicted speed, over no drafts, from which drafting begins. Smaller gains are lost: prompts take as
long with drafts as without, a response's last step yields more tokens than the response needs, and slots stay empty
between responses that end at different times. Item 1 of deploy/bench measures steps and whole responses"""

KEPT_GAIN = 0.08
"""relative gain below which drafting ends; lower than LEAST_GAIN, so that noise does not switch drafts on and off"""

TOLERANCE = 0.05
"""relative loss in predicted speed that is accepted for a shorter draft. Predictions are no more exact than this, and
they favour long drafts, which lose more tokens at the end of a response"""

HYSTERESIS = 0.03
"""relative gain in predicted speed that another draft length needs before it replaces the one in use"""


class StepCosts(BaseModel):
    """Seconds of a decoding step by draft length and batch size.

    Example: `StepCosts(batch_sizes=[1, 16], seconds=[[0.02, 0.03], [0.022, 0.04]], first=[[0.05, 0.2], [0.05, 0.2]])`
    was measured without drafts and with one draft token, for batches of 1 and of 16 completions.
    """

    batch_sizes: list[int]
    """batch sizes that were measured, ascending"""
    seconds: list[list[float]]
    """seconds of a step, as [draft length from 0][batch size]"""
    first: list[list[float]]
    """seconds from the arrival of all prompts at once to the end of the first step; same layout"""

    @model_validator(mode="after")
    def is_a_grid(self) -> "StepCosts":
        if not self.batch_sizes or self.batch_sizes != sorted(set(self.batch_sizes)):
            raise ValueError("batch_sizes: must be ascending, with at least one size")
        if not self.seconds or len(self.first) != len(self.seconds):
            raise ValueError("seconds, first: need a row for each draft length from 0")
        if any(len(row) != len(self.batch_sizes) for row in (*self.seconds, *self.first)):
            raise ValueError("seconds, first: need an entry for each batch size in every row")
        return self

    @property
    def draft_tokens(self) -> int:
        """The longest draft that was measured."""
        return len(self.seconds) - 1

    def at(self, batch: int, drafts: int) -> float:
        """Seconds of a step: linear between the measured batch sizes, and that of the nearest size outside of them."""
        return float(np.interp(batch, self.batch_sizes, self.seconds[drafts]))

    def prompts(self, batch: int) -> float:
        """Seconds that `batch` prompts take that arrive at once: the median over draft lengths, which hardly matter."""
        of_lengths = [
            float(np.interp(batch, self.batch_sizes, first)) - self.at(batch, drafts)
            for drafts, first in enumerate(self.first)
        ]
        return float(np.median(of_lengths))


def tokens_per_step(acceptance: Sequence[float], drafts: int) -> float:
    """Tokens that a step yields for one completion, the verifier's token included. `acceptance[i - 1]` is a_i."""
    return 1.0 + sum(acceptance[:drafts])


def tokens_per_second(costs: StepCosts, acceptance: Sequence[float], batch: int, drafts: int) -> float:
    return batch * tokens_per_step(acceptance, drafts) / costs.at(batch, drafts)


def speeds_by_length(costs: StepCosts, acceptance: Sequence[float], batch: int) -> list[float]:
    """Predicted tokens per second of a batch of `batch` completions, by draft length from 0."""
    return [tokens_per_second(costs, acceptance, batch, drafts) for drafts in range(costs.draft_tokens + 1)]


def threshold(without_drafts: float, in_use: int) -> float:
    """The speed from which drafting pays.

    `without_drafts` is the speed without drafts. `in_use` is the current draft length.
    """
    return without_drafts * (1.0 + (KEPT_GAIN if in_use else LEAST_GAIN))


def choose_length(speeds: Sequence[float], in_use: int) -> int:
    """The draft length for one batch size. `speeds` is by draft length from 0; `in_use` is the current length."""
    least, fastest = threshold(speeds[0], in_use), max(speeds[1:])
    if fastest < least:
        return 0
    best = next(k for k, speed in enumerate(speeds) if k and speed >= max(least, (1.0 - TOLERANCE) * fastest))
    return best if in_use == 0 or speeds[best] >= (1.0 + HYSTERESIS) * speeds[in_use] else in_use


def choose_drafts(
    costs: StepCosts, acceptance: Sequence[float], batches: int, in_use: Sequence[int] | None = None
) -> list[int]:
    """The draft length for each batch size from 1 to `batches`. `in_use` are the current lengths (None: all zero)."""
    return [
        choose_length(speeds_by_length(costs, acceptance, batch), now)
        for batch, now in zip(range(1, batches + 1), in_use or [0] * batches, strict=True)
    ]


def to_ranges(drafts: Sequence[int]) -> list[Range]:
    """Draft lengths for batch sizes 1, 2, ... as ranges. Example: `[3, 3, 0]` is `[(1, 2, 3), (3, 3, 0)]`."""

    def runs() -> Iterator[Range]:
        first = 1
        for length, run in groupby(drafts):
            last = first + len(list(run)) - 1
            yield first, last, length
            first = last + 1

    return list(runs())


def to_drafts(ranges: Sequence[Range], batches: int) -> list[int]:
    """Draft lengths for batch sizes 1 to `batches`. A size in no range has that of the size before it, as in vLLM."""
    drafts = [0] * batches
    for first, _, length in sorted(ranges):
        drafts[first - 1 :] = [length] * len(drafts[first - 1 :])
    return drafts


def check_ranges(ranges: Sequence[Range], draft_tokens: int) -> None:
    """Raises ValueError, which names the range, unless ranges begin at 1, do not overlap, and fit `draft_tokens`."""
    if not ranges:
        raise ValueError("schedule: needs at least one range [smallest batch size, largest, draft tokens]")
    end = 0
    for first, last, length in ranges:
        shown = f"schedule: range [{first}, {last}, {length}]"
        if first > last:
            raise ValueError(f"{shown} ends before it begins")
        if end == 0 and first != 1:
            raise ValueError(f"{shown} must begin at batch size 1: it is the first")
        if first <= end:
            raise ValueError(f"{shown} must begin after {end}, where the one before it ends")
        if not 0 <= length <= draft_tokens:
            raise ValueError(f"{shown} drafts {length} tokens; it may draft from 0 to draft_tokens = {draft_tokens}")
        end = last


class AcceptanceEstimate:
    """Acceptance by position: starts from an earlier estimate and follows recent observations.

    For each position the class keeps the conditional rate: how often a draft token there is accepted, given that all
    draft tokens before it are. So a position that is not drafted at present keeps its rate while earlier ones change.
    """

    HALF_LIFE = 2000
    """number of observations at a position after which older ones count half"""

    def __init__(self, acceptance: Sequence[float], weight: float):
        """`acceptance` is by position, and counts as if it had been observed in `weight` drafts."""
        self.start = list(acceptance), weight
        self.start_over()

    def start_over(self) -> None:
        """Forgets all observations, because the drafter has changed."""
        acceptance, weight = self.start
        before = [1.0, *acceptance]
        self.trials = [weight for _ in acceptance]
        self.successes = [
            weight * (now / prior if prior else 0.0) for prior, now in zip(before, acceptance, strict=False)
        ]
        self.drafts = 0

    def observe(self, drafted: Sequence[int], accepted: Sequence[int]) -> None:
        """Counts one step of the engine. At each position: completions with a draft token, and those that accept it."""
        self.drafts += drafted[0]
        reached: float = drafted[0]
        for i in range(len(self.trials)):
            if reached <= 0:
                break
            decay = 0.5 ** (reached / self.HALF_LIFE)
            self.trials[i] = decay * self.trials[i] + reached
            self.successes[i] = decay * self.successes[i] + accepted[i]
            if i + 1 < len(self.trials):
                # Of the completions that accepted this token, count the share that drafted a next one: a draft is
                # cut short where the response may not be longer.
                reached = accepted[i] * drafted[i + 1] / drafted[i]

    @property
    def by_position(self) -> list[float]:
        return list(accumulate((s / t for s, t in zip(self.successes, self.trials, strict=True)), mul))


class LiveSchedule:
    """The schedule of one running engine: chosen from its costs, and chosen again when acceptance changes.

    At draft length zero no acceptance is observed. Drafting can begin again at such a batch size because smaller batch
    sizes still draft, and every batch passes through them while it drains, or because a new drafter arrives.
    """

    LOOK_EVERY = 100
    """number of drafts between two choices"""

    def __init__(self, costs: StepCosts, acceptance: AcceptanceEstimate, batches: int):
        self.costs, self.acceptance = costs, acceptance
        self.drafts = choose_drafts(costs, acceptance.by_position, batches)
        self.changes = 0
        self._looked_at = 0

    @property
    def ranges(self) -> list[Range]:
        return to_ranges(self.drafts)

    def observe(self, drafted: Sequence[int], accepted: Sequence[int]) -> bool:
        """Counts one step of the engine. Returns whether the schedule has changed."""
        self.acceptance.observe(drafted, accepted)
        if self.acceptance.drafts < self._looked_at + self.LOOK_EVERY:
            return False
        self._looked_at = self.acceptance.drafts
        return self._choose()

    def start_over(self) -> bool:
        """Starts over for a new drafter. Returns whether the schedule has changed."""
        self.acceptance.start_over()
        self._looked_at = 0
        return self._choose()

    def _choose(self) -> bool:
        chosen = choose_drafts(self.costs, self.acceptance.by_position, len(self.drafts), self.drafts)
        changed = chosen != self.drafts
        self.drafts = chosen
        self.changes += changed
        return changed


class Calibration(BaseModel):
    """The measurements and the choice of `rollout-service calibrate`: the file that `drafter.schedule` names."""

    policy: str
    kind: str
    """kind of the drafter"""
    draft_tokens: int
    """the longest draft that was measured"""
    costs: StepCosts
    baseline: StepCosts
    """costs of an engine without a drafter, at the same batch sizes"""
    acceptance: list[float]
    """acceptance by position, on the given prompts"""
    ranges: list[Range]
    """the chosen draft lengths"""
    predicted_speedup: dict[int, float]
    """speed relative to no drafter, by number of streams. Each stream generates `responses_per_stream` responses of
    `response_tokens` tokens"""
    response_tokens: int
    responses_per_stream: int
    machine: dict[str, Any]
    """the machine that was measured: processor, cores, versions"""
