"""Loss: the configuration that every policy loss shares, and the method that gives its per-token terms.

These classes are part of the configuration, so this room imports torch only when it computes.
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
    """One loss. To add one, write a file with a subclass (`kind`, the defaults that differ, `terms`), and name it in
    `registry.py`."""

    kind: str
    average: Average = "token"
    """how terms are averaged. token: all tokens count alike; sequence: all responses count alike; constant: each
    response's sum is divided by max_tokens"""
    normalise_advantages: Flag = True
    """divide a group's advantages by the standard deviation of its rewards"""
    dynamic_sampling: Flag = False
    """replace groups whose rewards are all equal, until the step is full"""
    overlong_share: BelowOne = 0.0
    """share of max_tokens, at its end, over which the reward falls linearly by 1 (DAPO); 0 for no penalty"""

    @abstractmethod
    def terms(self, batch: "LossInput") -> "LossTerms":
        """The loss term of each response token, before averaging."""


class ClippedLoss(Loss):
    """A loss that clips the ratio of the trained policy to the old one."""

    clip_low: BelowOne = 0.2
    """the ratio is clipped at 1 - clip_low from below"""
    clip_high: AboveZero = 0.2
    """the ratio is clipped at 1 + clip_high from above"""
