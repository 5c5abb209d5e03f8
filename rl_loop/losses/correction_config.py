"""Configuration of corrections for tokens of an older policy, one class per kind. Imports no torch.

losses/corrections.py applies them and names their papers.
"""

from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from drafters.by_kind import by_kind
from drafters.settings import Section

Lowest = Annotated[float, Field(ge=0.0)]
Highest = Annotated[float, Field(gt=0.0)]


class CorrectionConfig(Section):
    """How training corrects for tokens that another policy sampled than the one that trains on them."""

    kind: str
    proximal: Literal["recomputed", "sampling"] = "recomputed"
    """the denominator of the clipped ratio. recomputed: the policy before the step, as in the decoupled objective;
    sampling: the policy that sampled the token"""


class Weighing(CorrectionConfig):
    tokens: Literal["off_policy", "all"] = "off_policy"
    """which tokens are corrected. off_policy: those of older weight versions; all: also the others, for differences
    between the engine's and the trainer's numerics"""


class WholeRatio(Weighing):
    @field_validator("proximal")
    @classmethod
    def _is_not_the_ratio(cls, proximal: str) -> str:
        if proximal == "sampling":
            raise ValueError(
                'this kind has no effect with proximal = "sampling": choose another kind, or proximal = "recomputed"'
            )
        return proximal


class Truncated(WholeRatio):
    """weighs a token by the ratio of the policy before the step to the sampling policy, but by at most `high`"""

    kind: Literal["truncated"] = "truncated"
    high: Highest = 2.0
    """largest ratio"""


class Decoupled(WholeRatio):
    """weighs a token by that ratio, without a limit"""

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
    """weighs a token by the ratio, or by 0 if the ratio is below `low` or above `high`"""

    kind: Literal["icepop"] = "icepop"
    low: Lowest = 0.5
    """smallest ratio"""
    high: Highest = 5.0


class SequenceMask(Bounded):
    """weighs a token by the ratio, or by 0 if the response's geometric mean ratio is below `low` or above `high`"""

    kind: Literal["sequence_mask"] = "sequence_mask"
    low: Lowest = 0.9
    high: Highest = 1.1


class NoCorrection(CorrectionConfig):
    """weighs all tokens alike"""

    kind: Literal["none"] = "none"


CORRECTIONS: tuple[type[CorrectionConfig], ...] = (Truncated, Decoupled, IcePop, SequenceMask, NoCorrection)

if TYPE_CHECKING:
    AnyCorrection: TypeAlias = CorrectionConfig
else:
    AnyCorrection = by_kind(CORRECTIONS)
