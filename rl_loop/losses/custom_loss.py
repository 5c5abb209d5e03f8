"""CustomLoss: the user's own loss, `kind = "package.module:function"`, called as `function(batch, **options)`.

def reinforce(batch: LossInput, scale: float = 1.0) -> LossTerms:
    terms_N = -scale * batch.advantages_N * batch.logprobs_N
    return LossTerms(terms_N, torch.zeros_like(terms_N, dtype=torch.bool))
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

from pydantic import Field, field_validator

from rl_loop.custom_function import PATH, load_function
from rl_loop.losses.loss import Loss
from rl_loop.losses.terms import LossInput, LossTerms


class CustomLoss(Loss):
    """your own function, called with a batch and `options`"""

    kind: str = Field(title="package.module:function")
    options: dict[str, Any] = Field(default_factory=dict)
    """further arguments of your own loss function, by name"""

    @field_validator("kind")
    @classmethod
    def _is_a_function(cls, kind: str) -> str:
        if not PATH.fullmatch(kind):
            raise ValueError("must be a built-in loss or a package.module:function")
        return kind

    @cached_property
    def function(self) -> Callable[..., LossTerms]:
        """The loss function. Raises CustomFunctionError if it cannot be imported, or does not take a batch and the
        options."""
        return load_function(self.kind, "loss.kind", "a batch and loss.options", None, **self.options)

    def terms(self, batch: LossInput) -> LossTerms:
        return self.function(batch, **self.options)
