"""PolicyLearner: the interface between the training loops and whatever trains the policy.

    logprobs, reference_logprobs    every rollout, scored before the step
    train                           the step: epochs of minibatches, each one
      forward_backward                the minibatch's gradient
      optimiser_step                  one update by it
    export                          the policy, as the service loads it
    save, load                      the learner's part of a checkpoint

The model, its parameters and the optimiser are the learner's own: nothing here hands them out, so that a learner may be
spread over devices and processes. LocalLearner (local_learner.py) has them on one device.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel
from torch import Tensor

from drafters.learners.learner import PolicyOutputs
from drafters.scoring import TokenScores
from rl_loop.batching import MicroBatch, Rollout
from rl_loop.config import TrainConfig


@dataclass(frozen=True)
class Example:
    """A rollout as it is trained on. Log-probabilities are of its response tokens, at the sampling temperature."""

    rollout: Rollout
    advantage: float
    old_logprobs: Tensor
    """under the policy that the clipped ratio is taken to: the one before the step's first update"""
    reference_logprobs: Tensor | None = None
    """all examples of a step have them, or none"""
    weights: Tensor | None = None
    """of its tokens' loss terms, for tokens of another policy; all examples of a step have them, or none"""


class LossMetrics(BaseModel):
    """Means over the examples of one optimiser update, or over the updates of a step."""

    loss: float
    clip_fraction: float
    policy_ratio: float
    """new policy to old, while training on the step"""
    policy_kl: float
    """from the old policy to the new"""
    reference_kl: float
    """from the policy to the reference; 0 without one"""


class UpdateMetrics(LossMetrics):
    """Means over a step's optimiser updates."""

    grad_norm: float
    """before clipping"""
    learning_rate: float


@dataclass(frozen=True)
class HiddenStateReader:
    """What a drafter sees of the policy while it scores rollouts."""

    layers: tuple[int, ...]
    """ids of the hidden states that are kept, as `DrafterLearner.policy_layers`"""
    read: Callable[[MicroBatch, PolicyOutputs], None]
    """called after each micro-batch's forward"""


class PolicyLearner(ABC):
    def __init__(self, config: TrainConfig):
        self.config = config
        self.holds_part_of_a_step = False
        """whether some updates of a step are made, and the others are not"""

    @abstractmethod
    def logprobs(self, rollouts: Sequence[Rollout], reader: HiddenStateReader | None = None) -> list[TokenScores]:
        """Of each rollout's response tokens under the policy as it samples. No gradient, on the CPU."""

    @abstractmethod
    def reference_logprobs(self, rollouts: Sequence[Rollout]) -> Sequence[Tensor | None]:
        """Of each rollout's response tokens under the reference, at the sampling temperature; Nones without one."""

    @abstractmethod
    def forward_backward(self, examples: Sequence[Example]) -> LossMetrics:
        """The gradient of the mean loss over the examples takes the place of the one before."""

    @abstractmethod
    def optimiser_step(self, learning_rate: float) -> float:
        """One update by the gradient, clipped to `max_grad_norm`. Returns its norm before that."""

    @abstractmethod
    def export(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The policy under its checkpoint's names, whole, floating-point tensors in `dtype`. They may share memory with
        the learner: the next update may change them."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Into a checkpoint that is being written: the policy as any Hugging Face model, and trainer/."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote. Raises OSError, ValueError and RuntimeError when that is no such policy."""

    @abstractmethod
    def checkpoint_bytes(self) -> int:
        """About what `save` writes."""

    def train(self, examples: Sequence[Example], *, step: int) -> UpdateMetrics:
        """`epochs` times `minibatches` updates on one step's examples. `step`, from 0, sets the learning rate and the
        order of minibatches."""
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
        """Examples of each update: all of them, or equal random parts."""
        order, parts = list(examples), self.config.minibatches
        if parts > 1:
            random.Random(f"{self.config.seed} {step} {epoch}").shuffle(order)
        return [order[len(order) * part // parts : len(order) * (part + 1) // parts] for part in range(parts)]

    def _learning_rate(self, step: int) -> float:
        rising = min(1.0, (step + 1) / self.config.warmup_steps) if self.config.warmup_steps else 1.0
        return self.config.learning_rate * rising
