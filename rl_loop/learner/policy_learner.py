"""PolicyLearner: the interface between the training loops and what trains the policy.

    logprobs, reference_logprobs    score every rollout before the step
    routing                         say how its experts were chosen in that, if the policy has experts
    train                           train the step: epochs of minibatches, and for each minibatch
      forward_backward                compute its gradient
      optimiser_step                  make one update by it
    export                          give the policy as the service loads it
    save, load                      write and read the learner's part of a checkpoint

No method hands out the model, its parameters or the optimiser, so a learner may be spread over devices and processes.
LocalLearner (local_learner.py) has them on one device.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel
from torch import Tensor

from drafters.expert_routing import Routing
from drafters.learners.learner import PolicyOutputs
from drafters.scoring import TokenScores
from rl_loop.batching import MicroBatch, Rollout
from rl_loop.config import TrainConfig


@dataclass(frozen=True)
class Example:
    """A rollout to train on. Log-probabilities are of its response tokens, at the sampling temperature."""

    rollout: Rollout
    advantage: float
    old_logprobs: Tensor
    """under the policy in the denominator of the clipped ratio: the one before the step's first update, or with
    `proximal = "sampling"` the one that sampled"""
    reference_logprobs: Tensor | None = None
    """under the reference policy; either all examples of a step have them, or none"""
    weights: Tensor | None = None
    """weights of its tokens' loss terms, from the correction; either all examples of a step have them, or none"""


class LossMetrics(BaseModel):
    """Means over the examples of one optimiser update, or over the updates of a step."""

    loss: float
    clip_fraction: float
    policy_ratio: float
    """mean ratio of the new policy to the old one, during training on the step"""
    policy_kl: float
    """KL divergence from the old policy to the new"""
    reference_kl: float
    """KL divergence from the policy to the reference; 0 without a reference"""


class UpdateMetrics(LossMetrics):
    """Means over a step's optimiser updates."""

    grad_norm: float
    """before clipping"""
    learning_rate: float


@dataclass(frozen=True)
class HiddenStateReader:
    """What a drafter sees of the policy while it scores rollouts."""

    layers: tuple[int, ...]
    """ids of the hidden states to keep, as in `DrafterLearner.policy_layers`"""
    read: Callable[[MicroBatch, PolicyOutputs], None]
    """called after each micro-batch's forward"""


class PolicyLearner(ABC):
    def __init__(self, config: TrainConfig):
        self.config = config
        self.holds_part_of_a_step = False
        """whether only some updates of a step were made"""

    @abstractmethod
    def logprobs(self, rollouts: Sequence[Rollout], reader: HiddenStateReader | None = None) -> list[TokenScores]:
        """Scores of each rollout's response tokens under the policy as it samples, without gradient, on the CPU."""

    @abstractmethod
    def reference_logprobs(self, rollouts: Sequence[Rollout]) -> Sequence[Tensor | None]:
        """Log-probabilities of each rollout's response tokens under the reference, at the sampling temperature. Without
        a reference, None for each rollout."""

    @abstractmethod
    def routing(self) -> Routing | None:
        """How the policy's experts were chosen when `logprobs` last scored rollouts, over the tokens from which
        response tokens are predicted. None for a policy without routers that are known (drafters/expert_routing.py)."""

    @abstractmethod
    def forward_backward(self, examples: Sequence[Example]) -> LossMetrics:
        """Compute the gradient of the mean loss over the examples. It replaces the previous gradient.

        With `router_coefficient`, how often each expert was chosen is that of `routing`: of all rollouts of the step,
        before its first update."""

    @abstractmethod
    def optimiser_step(self, learning_rate: float) -> float:
        """Make one update by the gradient, clipped to `max_grad_norm`. Returns the norm before clipping."""

    @abstractmethod
    def export(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """All tensors of the policy under their checkpoint names, floating-point ones in `dtype`. They may share memory
        with the learner, so the next update may change them."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write into a checkpoint folder: the policy as a Hugging Face model, and the optimiser in trainer/."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Continue from what `save` wrote. Raises OSError, ValueError and RuntimeError when it does not fit."""

    @abstractmethod
    def checkpoint_bytes(self) -> int:
        """The approximate size of what `save` writes."""

    def train(self, examples: Sequence[Example], *, step: int) -> UpdateMetrics:
        """Make `epochs` times `minibatches` updates on one step's examples. `step`, counted from 0, sets the learning
        rate and the order of minibatches."""
        learning_rate, updates = self._learning_rate(step), []
        for epoch in range(self.config.epochs):
            for minibatch in self._minibatches(examples, step, epoch):
                metrics = self.forward_backward(minibatch)
                self.holds_part_of_a_step = True
                updates.append(metrics.model_dump() | {"grad_norm": self.optimiser_step(learning_rate)})
        self.holds_part_of_a_step = False
        means = {name: sum(update[name] for update in updates) / len(updates) for name in updates[0]}
        return UpdateMetrics(**means, learning_rate=learning_rate)

    def _minibatches(self, examples: Sequence[Example], step: int, epoch: int) -> list[list[Example]]:
        """The examples of each update: all of them, or equal random parts."""
        order, parts = list(examples), self.config.minibatches
        if parts > 1:
            random.Random(f"{self.config.seed} {step} {epoch}").shuffle(order)
        return [order[len(order) * part // parts : len(order) * (part + 1) // parts] for part in range(parts)]

    def _learning_rate(self, step: int) -> float:
        rising = min(1.0, (step + 1) / self.config.warmup_steps) if self.config.warmup_steps else 1.0
        return self.config.learning_rate * rising
