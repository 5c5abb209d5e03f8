"""Configuration of corrections for tokens of an older policy, one class a kind. Imports no torch.

losses/corrections.py applies them, and names their papers.
"""

from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from drafters.by_kind import by_kind
from drafters.settings import Section

Lowest = Annotated[float, Field(ge=0.0)]
Highest = Annotated[float, Field(gt=0.0)]


class CorrectionConfig(Section):
    """For the difference between the policy that sampled a token and the one that is trained on it."""

    kind: str
    proximal: Literal["recomputed", "sampling"] = "recomputed"
    """what the clipped ratio is taken to: the policy before the step (the decoupled objective), or the sampling one"""


class Weighing(CorrectionConfig):
    tokens: Literal["off_policy", "all"] = "off_policy"
    """off_policy: only tokens of older weight versions; all: also for the engine's and the trainer's numerics"""


class WholeRatio(Weighing):
    @field_validator("proximal")
    @classmethod
    def _is_not_the_ratio(cls, proximal: str) -> str:
        if proximal == "sampling":
            raise ValueError("the sampling policy leaves this kind nothing to weigh: choose another kind")
        return proximal


class Truncated(WholeRatio):
    """weigh by trained over sampling policy, up to `high`"""

    kind: Literal["truncated"] = "truncated"
    high: Highest = 2.0
    """largest ratio"""


class Decoupled(WholeRatio):
    """weigh by the whole ratio"""

    kind: Literal["decoupled"] = "decoupled"


class Bounded(Weighing):
    low: Lowest
    """smallest ratio"""
    high: Highest

    @model_validator(mode="after")
    def _in_order(self) -> "Bounded":
        if self.low >= self.high:
            raise ValueError(f"low: {self.low} must be below high, {self.high}")
        return self


class IcePop(Bounded):
    """weigh by the ratio, and by 0 where it is outside of `low` to `high`"""

    kind: Literal["icepop"] = "icepop"
    low: Lowest = 0.5
    """smallest ratio"""
    high: Highest = 5.0


class SequenceMask(Bounded):
    """the same for whole responses, by their geometric mean ratio"""

    kind: Literal["sequence_mask"] = "sequence_mask"
    low: Lowest = 0.9
    high: Highest = 1.1


class NoCorrection(CorrectionConfig):
    """all tokens alike"""

    kind: Literal["none"] = "none"


CORRECTIONS: tuple[type[CorrectionConfig], ...] = (Truncated, Decoupled, IcePop, SequenceMask, NoCorrection)

if TYPE_CHECKING:
    AnyCorrection: TypeAlias = CorrectionConfig
else:
    AnyCorrection = by_kind(CORRECTIONS)
