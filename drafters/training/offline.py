"""Offline training of a drafter, on samples of a policy that does not change."""

import random
from collections.abc import Callable, Sequence

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from drafters.learners.learner import DrafterLearner, PolicyOutputs, read_policy, shifted
from drafters.training.config import OfflineTraining
from drafters.training.expected_acceptance import predicted_acceptance
from drafters.training.losses import DraftDistance
from drafters.training.samples import Sample, SampleBatch, epochs
from drafters.training.state import restore_training_state, training_state


def draft_loss(
    learner: DrafterLearner,
    policy: PolicyOutputs,
    batch: SampleBatch,
    *,
    draft_steps: int,
    step_decay: float,
    distance: DraftDistance,
) -> Tensor:
    """Mean distance over the rows that an engine could draft from, averaged over draft steps with decaying weights."""
    total, weights = torch.zeros((), device=batch.tokens_BT.device), 0.0
    head, targets = learner.output_head(policy), distance.targets(policy.head, policy.output_BTD)
    for j, states_BTD in enumerate(learner.draft_states(batch.tokens_BT, policy, draft_steps)):
        rows = batch.drafted(j)
        if rows.any():
            of_rows = tuple(shifted(target, j + 1)[rows] for target in targets)
            total = total + step_decay**j * distance(policy.head, of_rows, head, states_BTD[rows]).mean()
        weights += step_decay**j
    return total / weights


class OfflineTrainer:
    """One run: the learner, its optimiser and its learning rate schedule. The policy is only read.

    The same seed, samples and number of threads give the same result.
    """

    def __init__(
        self, learner: DrafterLearner, policy: PreTrainedModel, samples: Sequence[Sample], settings: OfflineTraining
    ):
        self.learner, self.policy, self.samples, self.settings = learner, policy, samples, settings
        self.distance = DraftDistance(settings.loss, top_k=settings.top_k, temperature=settings.temperature)
        self.optimiser = torch.optim.AdamW(
            learner.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay
        )
        self.schedule = get_cosine_schedule_with_warmup(self.optimiser, settings.warmup, settings.steps)
        self.losses: list[float] = []
        """one loss for each step, including those before a resume"""
        self.batches = epochs(samples, settings.batch_size, settings.seed)

    @property
    def step(self) -> int:
        return len(self.losses)

    def update(self) -> float:
        """One optimiser step; returns its loss."""
        batch, settings = next(self.batches).to(self.policy.device), self.settings
        loss = draft_loss(
            self.learner,
            read_policy(self.policy, batch.tokens_BT, self.learner.policy_layers),
            batch,
            draft_steps=settings.draft_steps,
            step_decay=settings.step_decay,
            distance=self.distance,
        )
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.learner.parameters(), 1.0)
        self.optimiser.step()
        self.schedule.step()
        self.losses.append(loss.item())
        return self.losses[-1]

    def validate(self, held_out: list[Sample]) -> list[float]:
        """Predicted acceptance by position on `held_out`."""
        settings = self.settings
        return predicted_acceptance(
            self.learner, self.policy, held_out, settings.draft_steps, temperature=settings.temperature
        )

    def state(self) -> dict[str, Tensor]:
        """Learner, optimiser and losses as tensors, for `restore` to read."""
        losses = torch.tensor(self.losses, dtype=torch.float64)
        return training_state(self.learner, self.optimiser) | {"losses": losses}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Goes on from the tensors of `state`. Raises RuntimeError if they are another learner's."""
        restore_training_state(tensors, self.learner, self.optimiser)
        self.losses = tensors["losses"].tolist()
        self.schedule.last_epoch = self.step
        self.optimiser.param_groups[0]["lr"] = self.settings.learning_rate * self.schedule.lr_lambdas[0](self.step)
        self.batches = epochs(self.samples, self.settings.batch_size, self.settings.seed, skip=self.step)


def train_offline(
    trainer: OfflineTrainer,
    title: str,
    held_out: list[Sample] | None = None,
    validated: Callable[[int, list[float]], None] = lambda step, by_position: None,
    after_step: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """Trains up to `settings.steps`, with a progress bar called `title`. Returns the loss of each step.

    With `held_out`, `validated` receives the acceptance by position before the first step, every `validate_every` steps
    and after the last step. `after_step` receives the number of each finished step.
    """
    settings, shown = trainer.settings, ""

    def validate() -> None:
        nonlocal shown
        if held_out:
            by_position = trainer.validate(held_out)
            validated(trainer.step, by_position)
            shown = f", acceptance length {1 + sum(by_position):.2f}"

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        bar = progress.add_task(title, total=settings.steps, completed=trainer.step)
        if trainer.step == 0:
            validate()
        while trainer.step < settings.steps:
            loss = trainer.update()
            if trainer.step % settings.validate_every == 0 or trainer.step == settings.steps:
                validate()
            after_step(trainer.step)
            progress.update(bar, advance=1, description=f"{title}: loss {loss:.3f}{shown}")
    return trainer.losses


def split(samples: list[Sample], share: float, most: int = 512) -> tuple[list[Sample], list[Sample]]:
    """Training and held-out samples. If there are several prompts, no prompt is in both."""
    by_prompt: dict[tuple[int, ...], list[Sample]] = {}
    for number, sample in enumerate(samples):
        by_prompt.setdefault(tuple(sample.prompt) or (-number,), []).append(sample)
    groups = list(by_prompt.values())
    if len(groups) == 1:
        groups = [[sample] for sample in samples]
    wanted = min(most, max(1, round(share * len(samples))))
    held_out: list[Sample] = []
    while groups and len(held_out) < wanted:
        held_out += groups.pop()
    training = [sample for group in groups for sample in group]
    random.Random(0).shuffle(training)
    return training, held_out[:most]
