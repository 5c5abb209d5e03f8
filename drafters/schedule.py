"""Schedule of draft lengths by batch size, from the measured cost of a step and the acceptance by position.

With b completions under way and k drafts each, a step yields b (1 + a_1 + ... + a_k) tokens, a_i being the probability
that the first i drafts are all accepted, and takes c(b, k) seconds. Their ratio is the predicted speed. A draft length
is worth drafting when it gains LEAST_GAIN over the speed without drafts. Of those that do, the shortest is chosen that
is as fast as the fastest within TOLERANCE. Acceptance moves the choice while an engine runs; costs are measured once.
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
"""relative gain in predicted speed over drafting nothing at which drafting begins. Smaller gains do not reach the user:
prompts take as long with drafts, a response's last step yields more than is asked for, and batches are not full between
responses that end apart. Measured with responses of 48 tokens: steps 1.05 to 1.2 times as fast as without drafts made
them 0.95 to 1.08 times as fast"""

KEPT_GAIN = 0.08
"""the same, below which drafting ends where it is under way: lower, so that noise does not switch it on and off"""

TOLERANCE = 0.05
"""relative loss in predicted speed for which a shorter draft is taken: predictions are no better, and they favour long
drafts, which lose more at a response's end"""

HYSTERESIS = 0.03
"""relative gain in predicted speed that another draft length must promise before it replaces the one in use"""


class StepCosts(BaseModel):
    """Seconds of a decoding step by draft length and batch size.

    Example: `StepCosts(batch_sizes=[1, 16], seconds=[[0.02, 0.03], [0.022, 0.04]], first=[[0.05, 0.2], [0.05, 0.2]])`
    was measured without drafts and with one, for 1 and for 16 completions at a time.
    """

    batch_sizes: list[int]
    """that were measured, ascending"""
    seconds: list[list[float]]
    """[draft length from 0][batch size]"""
    first: list[list[float]]
    """[draft length from 0][batch size]: from the prompts' arrival, all at once, to the end of their first such step"""

    @model_validator(mode="after")
    def is_a_grid(self) -> "StepCosts":
        if not self.batch_sizes or self.batch_sizes != sorted(set(self.batch_sizes)):
            raise ValueError("batch_sizes: must be ascending, and one at least")
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
        """Seconds, linear between the measured batch sizes; outside of them those of the nearest."""
        return float(np.interp(batch, self.batch_sizes, self.seconds[drafts]))

    def prompts(self, batch: int) -> float:
        """Seconds that so many prompts take which arrive at once; the draft length hardly matters to them."""
        of_lengths = [
            float(np.interp(batch, self.batch_sizes, first)) - self.at(batch, drafts)
            for drafts, first in enumerate(self.first)
        ]
        return float(np.median(of_lengths))


def tokens_per_step(acceptance: Sequence[float], drafts: int) -> float:
    """Of one completion, the verifier's own token included. `acceptance[i - 1]` is a_i."""
    return 1.0 + sum(acceptance[:drafts])


def tokens_per_second(costs: StepCosts, acceptance: Sequence[float], batch: int, drafts: int) -> float:
    return batch * tokens_per_step(acceptance, drafts) / costs.at(batch, drafts)


def speeds_by_length(costs: StepCosts, acceptance: Sequence[float], batch: int) -> list[float]:
    """Predicted tokens per second of `batch` completions together, by draft length from 0."""
    return [tokens_per_second(costs, acceptance, batch, drafts) for drafts in range(costs.draft_tokens + 1)]


def threshold(without_drafts: float, in_use: int) -> float:
    """The least speed that is worth drafting for, where the speed without drafts is `without_drafts` and the draft
    length `in_use`."""
    return without_drafts * (1.0 + (KEPT_GAIN if in_use else LEAST_GAIN))


def choose_length(speeds: Sequence[float], in_use: int) -> int:
    """The draft length for one batch size. `speeds` by draft length from 0; `in_use` is the length drafted so far."""
    least, fastest = threshold(speeds[0], in_use), max(speeds[1:])
    if fastest < least:
        return 0
    best = next(k for k, speed in enumerate(speeds) if k and speed >= max(least, (1.0 - TOLERANCE) * fastest))
    return best if in_use == 0 or speeds[best] >= (1.0 + HYSTERESIS) * speeds[in_use] else in_use


def choose_drafts(
    costs: StepCosts, acceptance: Sequence[float], batches: int, in_use: Sequence[int] | None = None
) -> list[int]:
    """The draft length for each batch size from 1 to `batches`, where `in_use` (at first none) are those so far."""
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
    """Draft lengths for batch sizes 1 to `batches`; a size in no range has that of the sizes before it, as in vLLM."""
    drafts = [0] * batches
    for first, _, length in sorted(ranges):
        drafts[first - 1 :] = [length] * len(drafts[first - 1 :])
    return drafts


def check_ranges(ranges: Sequence[Range], draft_tokens: int) -> None:
    """Raise ValueError, naming the range, unless they begin at 1, do not overlap, and draft at most `draft_tokens`."""
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
    """Acceptance by position that follows what was lately observed, from an estimate made before.

    Kept is, for each position, how often a draft there was accepted given that all before it were: so that a position
    which is not drafted at present keeps its own rate when the positions before it change.
    """

    HALF_LIFE = 2000
    """observations of a position after which earlier ones weigh half"""

    def __init__(self, acceptance: Sequence[float], weight: float):
        """`acceptance` by position, as if it had been observed in `weight` drafts."""
        self.start = list(acceptance), weight
        self.start_over()

    def start_over(self) -> None:
        """Forget what was observed: another drafter has come."""
        acceptance, weight = self.start
        before = [1.0, *acceptance]
        self.trials = [weight for _ in acceptance]
        self.successes = [
            weight * (now / prior if prior else 0.0) for prior, now in zip(before, acceptance, strict=False)
        ]
        self.drafts = 0

    def observe(self, drafted: Sequence[int], accepted: Sequence[int]) -> None:
        """Count one step of the engine: completions with a draft at each position, and of them those that accepted
        it."""
        self.drafts += drafted[0]
        reached: float = drafted[0]
        for i in range(len(self.trials)):
            if reached <= 0:
                break
            decay = 0.5 ** (reached / self.HALF_LIFE)
            self.trials[i] = decay * self.trials[i] + reached
            self.successes[i] = decay * self.successes[i] + accepted[i]
            if i + 1 < len(self.trials):
                # Of the completions that accepted this one, as many as drafted a next one (a draft is cut short where
                # the response may not be longer).
                reached = accepted[i] * drafted[i + 1] / drafted[i]

    @property
    def by_position(self) -> list[float]:
        return list(accumulate((s / t for s, t in zip(self.successes, self.trials, strict=True)), mul))


class LiveSchedule:
    """The schedule of one running engine: chosen from its costs, and chosen again as acceptance moves.

    At draft length zero nothing is observed. What brings drafting back is acceptance at the batch sizes that still
    draft, of which every batch has some while it drains, or a new drafter.
    """

    LOOK_EVERY = 100
    """drafts between two looks at whether the choice has changed"""

    def __init__(self, costs: StepCosts, acceptance: AcceptanceEstimate, batches: int):
        self.costs, self.acceptance = costs, acceptance
        self.drafts = choose_drafts(costs, acceptance.by_position, batches)
        self.changes = 0
        self._looked_at = 0

    @property
    def ranges(self) -> list[Range]:
        return to_ranges(self.drafts)

    def observe(self, drafted: Sequence[int], accepted: Sequence[int]) -> bool:
        """Whether the schedule is another one after this step of the engine."""
        self.acceptance.observe(drafted, accepted)
        if self.acceptance.drafts < self._looked_at + self.LOOK_EVERY:
            return False
        self._looked_at = self.acceptance.drafts
        return self._choose()

    def start_over(self) -> bool:
        """For a new drafter. Whether the schedule is another one."""
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
    """What `rollout-service calibrate` measured and chose: the file that `drafter.schedule` names."""

    policy: str
    kind: str
    """of the drafter"""
    draft_tokens: int
    """the longest draft that was measured"""
    costs: StepCosts
    baseline: StepCosts
    """of an engine without a drafter, at the same batch sizes"""
    acceptance: list[float]
    """by position, on the given prompts"""
    ranges: list[Range]
    """chosen"""
    predicted_speedup: dict[int, float]
    """by batch size, relative to no drafter: of so many streams, each of `responses_per_stream` responses of
    `response_tokens`"""
    response_tokens: int
    responses_per_stream: int
    machine: dict[str, Any]
    """where it was measured: processor, cores, versions"""
