"""Loss: the configuration that every policy loss shares, and the method that gives its per-token terms.

Configurations are made of these classes, so this room imports torch where it computes and not before.
"""

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field
from pydantic_settings import CliImplicitFlag

from drafters.settings import Section

if TYPE_CHECKING:
    from rl_loop.losses.terms import LossInput, LossTerms

Average = Literal["token", "sequence", "constant"]
BelowOne = Annotated[float, Field(ge=0.0, le=1.0)]
AboveZero = Annotated[float, Field(ge=0.0)]
Flag = CliImplicitFlag[bool]


class Loss(Section):
    """One loss. A new one is a file with a subclass (`kind`, the defaults that differ, `terms`), and its name in
    `registry.py`."""

    kind: str
    average: Average = "token"
    """over what: all tokens alike, all sequences alike, or a sum over max_tokens (constant)"""
    normalise_advantages: Flag = True
    """divide a group's advantages by the standard deviation of its rewards"""
    dynamic_sampling: Flag = False
    """replace groups whose rewards are all equal by others until the step is full"""
    overlong_share: BelowOne = 0.0
    """last part of max_tokens over which the reward falls linearly by 1 (DAPO); 0 for none"""

    @abstractmethod
    def terms(self, batch: "LossInput") -> "LossTerms":
        """Of each response token, before they are averaged."""


class ClippedLoss(Loss):
    """A loss that clips the ratio of the trained policy to the old one."""

    clip_low: BelowOne = 0.2
    """the ratio is clipped below 1 - clip_low"""
    clip_high: AboveZero = 0.2
    """and above 1 + clip_high"""
