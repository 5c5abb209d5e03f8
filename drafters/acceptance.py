"""Acceptance arithmetic: sums over draft steps, the ratios vLLM defines over them, and their confidence intervals.

A draft step proposes up to k tokens. The verifier accepts the first few of them and adds one token of its own. From
sums over steps follow

    acceptance length           accepted / steps + 1
    acceptance rate             accepted / drafted
    acceptance at position i    steps that accepted at least i tokens / steps

All three are ratios of sums, never means of ratios.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass
class Acceptance:
    """Counts over draft steps. `histogram[j]` is the number of steps that accepted j tokens.

    Example: `Acceptance(drafted=30, histogram=[4, 0, 0, 6])` has 10 steps, 18 accepted, length 2.8, rate 0.6.
    """

    drafted: int = 0
    histogram: list[int] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return sum(self.histogram)

    @property
    def accepted(self) -> int:
        return sum(j * count for j, count in enumerate(self.histogram))

    @property
    def accepted_by_position(self) -> list[int]:
        return [sum(self.histogram[i:]) for i in range(1, len(self.histogram))]

    @property
    def length(self) -> float:
        """Tokens that a verification yields, the verifier's own token included; 1.0 when nothing was drafted."""
        return 1.0 + self.accepted / self.steps if self.steps else 1.0

    @property
    def rate(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def by_position(self) -> list[float]:
        return [a / self.steps for a in self.accepted_by_position] if self.steps else []

    def __add__(self, other: "Acceptance") -> "Acceptance":
        width = max(len(self.histogram), len(other.histogram))
        mine, theirs = (h + [0] * (width - len(h)) for h in (self.histogram, other.histogram))
        return Acceptance(self.drafted + other.drafted, [a + b for a, b in zip(mine, theirs, strict=True)])


def total(parts: Iterable[Acceptance]) -> Acceptance:
    return sum(parts, Acceptance())


def length_interval(parts: Sequence[Acceptance], z: float = 1.96) -> tuple[float, float]:
    """Confidence interval of the acceptance length over independent completions (95 % by default).

    The steps of one completion depend on each other, so the completion is the sampling unit. With r = accepted / steps
    over all n completions, the variance is that of a ratio estimator (Cochran, Sampling Techniques, section 6.3):

        n / (n - 1) * sum over completions of (accepted_i - r steps_i)^2 / (sum of steps)^2

    The result is (nan, nan) when fewer than two completions have drafts.
    """
    parts = [part for part in parts if part.steps]
    if len(parts) < 2:
        return math.nan, math.nan
    whole = total(parts)
    ratio = whole.accepted / whole.steps
    variance = sum((part.accepted - ratio * part.steps) ** 2 for part in parts) / whole.steps**2
    half = z * math.sqrt(variance * len(parts) / (len(parts) - 1))
    return whole.length - half, whole.length + half


def length_at(steps: Iterable[tuple[int, int]], draft_tokens: int) -> float | None:
    """The acceptance length that drafts of `draft_tokens` tokens would have.

    `steps` are pairs (drafted, accepted), and their draft lengths may differ. A draft counts at each position that it
    reached, so a schedule that drafts less does not look like a worse drafter. A position that no draft reached takes
    the rate of the position before it. The result is None when nothing was drafted.
    """
    reached, accepted = [0] * draft_tokens, [0] * draft_tokens
    for drafted, taken in steps:
        for i in range(min(drafted, taken + 1, draft_tokens)):
            reached[i] += 1
            accepted[i] += i < taken
    if not draft_tokens or not reached[0]:
        return None
    length, survives, given = 1.0, 1.0, 1.0
    for before, after in zip(reached, accepted, strict=True):
        given = after / before if before else given
        survives *= given
        length += survives
    return length


def by_context_length(completions: Iterable[tuple[int, Sequence[tuple[int, int]]]]) -> dict[int, Acceptance]:
    """Acceptance by the number of context tokens at the start of a draft step, in classes that double: 1, 2, 4, 8, ...

    A completion is the length of its prompt and the pair (drafted, accepted) of each of its steps, in order. A step
    begins where the step before it ended. A step without drafts, such as the prompt's, only lengthens the context.
    """
    classes: dict[int, Acceptance] = {}
    for context, steps in completions:
        for drafted, accepted in steps:
            if drafted:
                floor = 1 << (context.bit_length() - 1)
                step = Acceptance(drafted, [0] * accepted + [1])
                classes[floor] = classes.get(floor, Acceptance()) + step
            context += accepted + 1
    return classes
