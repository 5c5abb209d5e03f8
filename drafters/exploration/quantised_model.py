"""A model's matrices in a format: which they are, their weights quantised, and what they are multiplied with."""

from collections.abc import Callable, Collection
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

EXPERTS = ("gate_up_proj", "up_proj", "down_proj")
"""matrices of all experts of a layer in one parameter [E, out, in]"""
GATES = ("gate", "shared_expert_gate")
"""routers and gates; vLLM does not quantise them either"""


def matrices(model: nn.Module, keep: Collection[str] = ()) -> dict[str, nn.Parameter]:
    """The weights of linear layers [out, in] and of experts [E, out, in], by name. Products sum over the last axis.

    Left out are gates, and every module with a part of its dotted name in `keep`. Embeddings are no matrices.
    """
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[name] = cast(nn.Parameter, module.weight)
        else:
            of_experts = [part for part in EXPERTS if isinstance(getattr(module, part, None), nn.Parameter)]
            found |= {f"{name}.{part}": getattr(module, part) for part in of_experts}
    return {name: weight for name, weight in found.items() if not {*GATES, *keep}.intersection(name.split("."))}


@torch.no_grad()
def quantise_weights(model: nn.Module, quantise: Callable[[Tensor], Tensor], keep: Collection[str]) -> None:
    """Quantises all matrices in place, each along the axis that its products sum over."""
    for weight in matrices(model, keep).values():
        weight.copy_(quantise(weight))


class LinearInputs(TorchFunctionMode):
    """While it is entered, what a matrix is multiplied with passes through `seen(name, input)`, in its place.

    Hooks would not do, because the products of experts are no modules. `eager_experts` makes them linear products.
    """

    def __init__(self, weights: dict[str, nn.Parameter], seen: Callable[[str, Tensor], Tensor]):
        super().__init__()
        self.names, self.seen = {id(weight): name for name, weight in weights.items()}, seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            x, weight, *bias = args
            name = self.names.get(id(weight if weight._base is None else weight._base))  # an expert's matrix is a view
            if name is not None:
                args = (self.seen(name, x), weight, *bias)
        return func(*args, **(kwargs or {}))


def eager_experts(model: nn.Module) -> None:
    """Has transformers compute experts one after the other, as linear products."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"
