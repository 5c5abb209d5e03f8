"""OnlineDrafter: a drafter trained on the policy's own forward passes, with separate versions and checkpoints.

    generation     policy N samples rollouts with drafter D, and the acceptance of D's drafts is recorded
    logprob        the learner scores every rollout once with policy N and keeps the hidden states: after each
                   micro-batch the drafter is updated on them
    train          the policy is updated, and the drafter is not
    prepare        policy N+1 is pushed, then the drafter if it has learned

The drafter learns from the forward pass that scores rollouts. Every rollout passes it exactly once, whatever its
advantage. (The forward pass that trains leaves out rollouts without advantage, and runs twice with gradient
checkpointing.) So the drafter needs no additional forward pass of the policy.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from drafters.acceptance import length_at
from drafters.files.model_folder import resolve_model
from drafters.learners.factory import load_learner
from drafters.learners.learner import DrafterLearner, PolicyOutputs, cast
from drafters.training.online import OnlineTrainer, UpdateRule
from drafters.training.samples import SampleBatch
from drafters.training.state import restore_training_state, training_state
from rl_loop.batching import MicroBatch
from rl_loop.config import TrainConfig
from rl_loop.learner.policy_learner import HiddenStateReader
from rollout_service.protocol import Completion

STATE, FACTS = "drafter.safetensors", "drafter.json"


@dataclass
class DrafterUpdate:
    """What a step did to the drafter."""

    losses: list[float] = field(default_factory=list)
    """loss of each optimiser update; empty in a step that did not train the drafter"""
    grad_norms: list[float] = field(default_factory=list)
    seconds: float = 0.0


class OnlineDrafter:
    """`learner` starts from the checkpoint that the service was started with."""

    def __init__(self, config: TrainConfig, learner: DrafterLearner):
        self.config, self.learner = config, learner
        self.trainer = OnlineTrainer(learner, config.online_drafter.training, config.sampling.temperature)
        self.rule = UpdateRule(config.online_drafter.training)
        self.version = 0
        self.trained_steps = 0
        self.unfinished: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        """state and facts from before the current step, which a checkpoint of the last finished step holds"""
        self.has_learned = False
        """whether it has learned since it was loaded or restored"""
        self.is_published = False
        """whether the engines hold what `learner` holds; False at first, since what they hold is not known"""

    @classmethod
    def load(cls, config: TrainConfig, policy: PreTrainedModel) -> "OnlineDrafter":
        """Raises ValueError and OSError when the checkpoint is missing or does not fit the policy."""
        folder = resolve_model(config.online_drafter.model or config.model, "online_drafter.model")
        # The policy's training must not change, so the random numbers for initial weights come from a fork.
        with torch.random.fork_rng(devices=[]):
            learner = load_learner(config.online_drafter.kind, folder, policy)
        return cls(config, learner.to(policy.device))

    @contextmanager
    def learning(
        self, step: int, acceptance_length: float | None
    ) -> Iterator[tuple[DrafterUpdate, HiddenStateReader | None]]:
        """Within this context, the policy scores the step's rollouts with the reader, from which the drafter learns.

        In a step that does not train the drafter, there is no reader. The `DrafterUpdate` says what was done.
        """
        update, facts = DrafterUpdate(), self._facts()
        if not self.rule.is_due(step, acceptance_length):
            yield update, None
            return
        self.unfinished, blocks = (training_state(self.learner, self.trainer.optimiser), facts), 0

        def read(batch: MicroBatch, outputs: PolicyOutputs) -> None:
            nonlocal blocks
            for block in batch.blocks:
                began, blocks = time.perf_counter(), blocks + 1
                of_block = SampleBatch(block.tokens_BT, block.response_BT)
                for loss, norm in self.trainer.learn(
                    outputs.at(block.indices_BT), of_block, f"{self.config.seed} {step} {blocks}"
                ):
                    update.losses.append(loss)
                    update.grad_norms.append(norm)
                update.seconds += time.perf_counter() - began

        yield update, HiddenStateReader(self.learner.policy_layers, read)
        self.trained_steps += 1
        if self.trained_steps % self.config.online_drafter.training.push_every == 0:
            self.is_published, self.has_learned = False, True

    def finish_step(self) -> None:
        """Keep what was learned: from now on a checkpoint holds it."""
        self.unfinished = None

    def publish(self, publish: Callable[..., int]) -> None:
        """Push the drafter with a Publisher's `publish` (rl_loop/loops/publishing.py), unless the engines hold it."""
        if not self.is_published:
            self.version = publish("drafter", self.export, self.version, is_new=self.has_learned)
            self.is_published = True

    def export(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The drafter's own tensors, under the names that the engines loaded."""
        return cast(self.learner.checkpoint(), dtype)

    def checkpoint_bytes(self) -> int:
        """The approximate size of what `save` writes: the weights, AdamW's two moments, and a copy for the engines."""
        return 4 * sum(parameter.nbytes for parameter in self.learner.parameters())

    def save(self, folder: Path) -> None:
        """Write into a checkpoint of the run: the state to resume from, and the drafter as an engine loads it.

        An unfinished step is undone first, since the checkpoint is that of the last finished step.
        """
        if self.unfinished is not None:
            self._restore(*self.unfinished)
        save_file(training_state(self.learner, self.trainer.optimiser), folder / "trainer" / STATE)
        (folder / "trainer" / FACTS).write_text(json.dumps(self._facts()), encoding="utf-8")
        self.learner.write(folder if self.learner.in_policy_folder else folder / "drafter", folder, torch.float32)

    def restore(self, folder: Path) -> None:
        """Restore the state that `save` wrote. Raises OSError when the checkpoint has no drafter."""
        facts = json.loads((folder / "trainer" / FACTS).read_text(encoding="utf-8"))
        self._restore(load_file(folder / "trainer" / STATE), facts)

    def _facts(self) -> dict[str, Any]:
        rule = {"best": self.rule.best, "is_behind": self.rule.is_behind, "last": self.rule.last}
        return {
            "version": self.version,
            "trained_steps": self.trained_steps,
            "updates": self.trainer.updates,
            **rule,
        }

    def _restore(self, state: dict[str, Tensor], facts: dict[str, Any]) -> None:
        restore_training_state(state, self.learner, self.trainer.optimiser)
        self.version, self.trained_steps = facts["version"], facts["trained_steps"]
        self.trainer.updates = facts["updates"]
        self.rule.best, self.rule.is_behind, self.rule.last = facts["best"], facts["is_behind"], facts["last"]
        self.unfinished, self.is_published, self.has_learned = None, False, False


@contextmanager
def learning_drafter(
    drafter: OnlineDrafter | None, step: int, completions: Sequence[Completion]
) -> Iterator[tuple[DrafterUpdate, HiddenStateReader | None]]:
    """`OnlineDrafter.learning` with the acceptance length of the step's rollouts, at the draft length that is trained.
    Without a drafter it does nothing."""
    if drafter is None:
        yield DrafterUpdate(), None
        return
    steps = [step for c in completions if c.speculation for step in c.speculation.steps or ()]
    with drafter.learning(step, length_at(steps, drafter.config.online_drafter.training.draft_steps)) as learning:
        yield learning
