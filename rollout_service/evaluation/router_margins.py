"""Margins of a policy's routers: how far the last expert that a router chose is above the best one that it left out.

A margin is in the scores by which the router chooses. For softmax routers these are the logits: a probability of one
expert among many is small, so a difference of probabilities says little about rounding. For Nemotron-H's they are
sigmoids with a correction bias.

N counts the tokens of a forward pass, E the experts, K the chosen ones, L the layers with a router.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from drafters.routers import routers_of

Flip = tuple[int, int]
"""(layer, token): there the router takes the best expert that it left out, instead of the last one that it chose"""


def choosing_routers(decoder: PreTrainedModel) -> list[nn.Module]:
    """The routers that leave experts out, from the first layer to the last. A policy without any is continuous.

    They are those that transformers knows, which return logits (N, E), weights (N, K) and experts (N, K). Routers that
    first choose among groups of experts are left out: their choice has more than one margin.
    """
    routers = routers_of(decoder).values()
    return [r for r in routers if r.top_k < len(r.weight) and getattr(r, "num_group", 1) == 1]


@contextmanager
def recorded_margins(routers: Sequence[nn.Module], flips: frozenset[Flip] = frozenset()) -> Iterator[list[Tensor]]:
    """A list that a forward pass fills with the margins of each router, float32 (N,). Layers of `flips` count
    `routers`."""
    margins: list[Tensor] = []

    def record(router: nn.Module, _: object, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits_NE, weights_NK, experts_NK = output
        scores_NE = choice_scores(router, logits_NE)
        least_N, slot_N = scores_NE.gather(1, experts_NK).min(1)
        best_N, runner_up_N = scores_NE.scatter(1, experts_NK, -torch.inf).max(1)
        layer = len(margins)
        margins.append(least_N - best_N)
        for token in (token for of_layer, token in flips if of_layer == layer):
            experts_NK[token, slot_N[token]] = runner_up_N[token]
        return logits_NE, weights_NK, experts_NK

    with ExitStack() as hooks:
        for router in routers:
            hooks.enter_context(_hooked(router, record))
        yield margins


@contextmanager
def _hooked(router: nn.Module, hook: Any) -> Iterator[None]:
    handle = router.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def choice_scores(router: nn.Module, logits_NE: Tensor) -> Tensor:
    """The scores by which the router chooses, float32 (N, E)."""
    bias = getattr(router, "e_score_correction_bias", None)
    return logits_NE.float() if bias is None else logits_NE.float().sigmoid() + bias
