"""Routing of a mixture of experts: the load of its experts, the entropy of its routers, and a loss that balances them.

L layers have a router each. It gives every token a probability for each of E experts, and chooses K of them. A forward
pass has S tokens, and N of them count: padding never does.

The loss is that of the Switch Transformer (Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6), for K experts as in
transformers' `load_balancing_loss_func`. For one layer, it is E times the sum of f_i P_i over its experts i:

    f_i  share of tokens that chose expert i, without gradient; over the experts they add up to K
    P_i  mean over tokens of the router's probability of expert i, with gradient

This is K when all experts are chosen alike, and E when every token chooses the same experts and is sure of them. Layers
count alike: the loss is the mean over them. (transformers first takes f and P over all layers. Then two layers that
each have a favourite look balanced together, if their favourites differ.)

The loss is linear in the probabilities once f is given. So with f of a whole batch, the losses and gradients of its
micro-batches add up to those of the batch, however it is divided (Qiu et al. 2025, arXiv 2501.11873, also say why f of
a large batch is the better one: it lets experts specialise).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from drafters.routers import routers_of

ROUTERS = {
    "MixtralTopKRouter",
    "OlmoeTopKRouter",
    "Qwen2MoeTopKRouter",
    "Qwen3MoeTopKRouter",
    "Qwen3NextTopKRouter",
}
"""transformers' classes of routers that choose by a softmax over all experts, and whose forward pass returns logits
(S, E), weights (S, K) and chosen experts (S, K)"""


def find_routers(policy: PreTrainedModel) -> list[nn.Module]:
    """The routers of the policy, from the first layer to the last. None for a dense policy."""
    return [router for router in routers_of(policy).values() if type(router).__name__ in ROUTERS]


@dataclass(frozen=True)
class Routing:
    """Sums over the tokens of one or more forward passes."""

    tokens: int
    chosen_LE: Tensor
    """int64: how many tokens chose each expert"""
    probabilities_LE: Tensor
    """float64: sums of the routers' probabilities"""
    entropies_L: Tensor
    """float64: sums of the entropies of these probabilities, in nats"""

    def __add__(self, other: "Routing") -> "Routing":
        return Routing(
            self.tokens + other.tokens,
            self.chosen_LE + other.chosen_LE,
            self.probabilities_LE + other.probabilities_LE,
            self.entropies_L + other.entropies_L,
        )

    @property
    def frequencies_LE(self) -> Tensor:
        """float64: f, the share of tokens that chose each expert; in each layer they add up to K"""
        return self.chosen_LE.double() / self.tokens

    @property
    def load_LE(self) -> Tensor:
        """float64: each expert's share of its layer's choices; in each layer they add up to 1"""
        return self.frequencies_LE / self.frequencies_LE.sum(1, keepdim=True)

    @property
    def entropy_L(self) -> Tensor:
        """float64: mean over tokens, in nats: log E where a router finds all experts equally likely"""
        return self.entropies_L / self.tokens

    @property
    def loss(self) -> float:
        """The load-balancing loss."""
        products_LE = self.frequencies_LE * self.probabilities_LE / self.tokens
        return products_LE.shape[1] * products_LE.sum(1).mean().item()


class RouterReading:
    """What the routers returned in the latest forward pass, filled in by the hooks of `reading_routers`."""

    def __init__(self) -> None:
        self.logits_SE: dict[int, Tensor] = {}
        """by layer, with gradient"""
        self.chosen_SK: dict[int, Tensor] = {}

    @torch.no_grad()
    def routing(self, tokens_N: Tensor) -> Routing:
        """The routing of the tokens at these indices of the forward pass."""
        of_layers = [probabilities_NE for _, probabilities_NE in self._probabilities(tokens_N)]
        chosen = [self.chosen_SK[layer].index_select(0, tokens_N).flatten() for layer in range(len(of_layers))]
        experts = of_layers[0].shape[1]
        return Routing(
            tokens=len(tokens_N),
            chosen_LE=torch.stack([of_layer.bincount(minlength=experts) for of_layer in chosen]),
            probabilities_LE=torch.stack([p_NE.sum(0, dtype=torch.float64) for p_NE in of_layers]),
            entropies_L=torch.stack([torch.special.entr(p_NE).sum(dtype=torch.float64) for p_NE in of_layers]),
        )

    def loss(self, tokens_N: Tensor, frequencies_LE: Tensor, *, tokens: int) -> Tensor:
        """The load-balancing loss of the tokens at these indices of the forward pass: a scalar, with gradient.

        `frequencies_LE`: f of the whole batch. The sums of probabilities are divided by `tokens`, the number of tokens
        of the whole batch, so that the parts of micro-batches add up.
        """
        layers, experts = frequencies_LE.shape
        products = [
            (frequencies_LE[layer].float() * probabilities_NE.sum(0)).sum()
            for layer, probabilities_NE in self._probabilities(tokens_N)
        ]
        return torch.stack(products).sum() * experts / (layers * tokens)

    def _probabilities(self, tokens_N: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Each layer's probabilities (N, E) in float32."""
        for layer in sorted(self.logits_SE):
            yield layer, self.logits_SE[layer].index_select(0, tokens_N).float().softmax(-1)


@contextmanager
def reading_routers(routers: Sequence[nn.Module]) -> Iterator[RouterReading]:
    """Sets hooks on the routers that keep what they return. They change nothing in a forward pass.

    Leave this context before the backward pass: with gradient checkpointing, that pass computes layers again.
    """
    read = RouterReading()

    def keep(layer: int) -> Any:
        def hook(_: nn.Module, __: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            read.logits_SE[layer], _weights, read.chosen_SK[layer] = output

        return hook

    hooks = [router.register_forward_hook(keep(layer)) for layer, router in enumerate(routers)]
    try:
        yield read
    finally:
        for hook in hooks:
            hook.remove()
