"""Forward passes of transformers wholly in float64.

Weights in float64 are not enough: transformers computes norms, softmaxes, routers and rotary angles in float32,
whatever the weights are.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class InFloat64(TorchFunctionMode):
    """Within it, each operation that asks for float32 takes float64."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is Tensor.float:
            return args[0].double()
        named = {name: _wider(value) for name, value in (kwargs or {}).items()}
        return function(*map(_wider, args), **named)


def _wider(argument: Any) -> Any:
    return torch.float64 if argument is torch.float32 else argument
