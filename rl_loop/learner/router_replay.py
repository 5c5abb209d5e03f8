"""Router replay: the policy's routers choose the experts that the engine chose. Source: R3, arXiv 2510.11370.

A mixture of experts is not continuous. Where two experts score nearly the same, the engine and the learner may choose
differently, and the log-probabilities of this and all later tokens jump. With the engine's choice they are those of the
experts that sampled. The weights of the experts are still the router's own, computed from its present scores as ever,
so gradients reach it.

S tokens of a forward pass, L layers, N experts, K of them active.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from drafters.routers import routers_of


class _Chosen(TorchFunctionMode):
    """Within this context, `torch.topk` takes these experts (S, K) in place of the best. Below 0 it takes the best.

    So a router does all else itself: it scores, normalises and scales as it is written."""

    def __init__(self, experts_SK: Tensor):
        super().__init__()
        self.experts_SK = experts_SK
        self.calls = 0
        """of `torch.topk`"""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function not in (torch.topk, Tensor.topk):
            return result
        self.calls += 1
        experts_SK = torch.where(self.experts_SK < 0, result[1], self.experts_SK)
        return torch.return_types.topk((args[0].gather(-1, experts_SK), experts_SK))  # type: ignore[attr-defined]


@contextmanager
def replaying(model: PreTrainedModel, experts_SLK: Tensor) -> Iterator[None]:
    """Within this context, the routers choose the experts of a forward pass: int64, below 0 for their own choice.

    The backward pass must also run within it, since gradient checkpointing computes the forward pass again.
    """
    routers = routers_of(model)
    for layer, router in routers.items():
        router.forward = partial(_choose, router.forward, experts_SLK[:, layer])
    try:
        yield
    finally:
        for router in routers.values():
            del router.forward


def _choose(forward: Callable[..., Any], experts_SK: Tensor, *inputs: Any, **more: Any) -> Any:
    with _Chosen(experts_SK):
        return forward(*inputs, **more)


@torch.no_grad()
def check_routers(model: PreTrainedModel) -> None:
    """Raises ValueError unless the policy has routers, and each chooses its experts by one `torch.topk`."""
    config: Any = model.config.get_text_config()
    routers = routers_of(model)
    if not routers:
        raise ValueError(f"router_replay: {type(model).__name__} has no routers; set it to false")
    for router in routers.values():
        state_1D = next(router.parameters()).new_zeros(1, config.hidden_size)
        with _Chosen(torch.full((1, 1), -1, device=state_1D.device)) as own:
            router(state_1D)
        if own.calls != 1:
            raise ValueError(
                f"router_replay: {type(router).__name__} does not choose its experts by one top-k, so they cannot be "
                "replayed; set it to false"
            )
