"""Train a drafter on samples of a policy that stays as it is."""

import torch
from pydantic import Field
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from drafters.learners.learner import Learner, PolicyOutputs, read_policy, shifted
from drafters.settings import Section
from drafters.training.losses import DISTANCES, Distance
from drafters.training.samples import Batch, Sample, epochs


class OfflineTraining(Section):
    """How a drafter is trained on a fixed set of samples (AdamW, cosine schedule)."""

    steps: int = Field(default=400, ge=1)
    """optimiser steps"""
    batch_size: int = Field(default=32, ge=1)
    """samples per step"""
    learning_rate: float = Field(default=2e-3, gt=0)
    """peak learning rate"""
    warmup: int = Field(default=20, ge=0)
    """steps of linear warm-up"""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's weight decay"""
    draft_steps: int = Field(default=3, ge=1)
    """draft steps that are unrolled and trained"""
    step_decay: float = Field(default=0.8, gt=0, le=1)
    """weight of a draft step's loss relative to the step before (0.8 in Eagle3)"""
    loss: str = Field(default="soft_cross_entropy", pattern="|".join(DISTANCES))
    """distance from the policy's distribution: soft_cross_entropy or total_variation"""
    seed: int = 0
    """order of the samples"""


def draft_loss(
    learner: Learner, policy: PolicyOutputs, batch: Batch, *, draft_steps: int, step_decay: float, distance: Distance
) -> Tensor:
    """Mean distance over the rows that the engine could draft from, averaged over draft steps by decaying weights."""
    total, weights = torch.zeros(()), 0.0
    for j, logprobs_BTV in enumerate(learner.draft_logprobs(batch.tokens_BT, policy, draft_steps)):
        rows = batch.drafted(j)
        total = total + step_decay**j * distance(shifted(policy.logprobs_BTV, j + 1)[rows], logprobs_BTV[rows]).mean()
        weights += step_decay**j
    return total / weights


def train_offline(
    learner: Learner, policy: PreTrainedModel, samples: list[Sample], settings: OfflineTraining, title: str
) -> list[float]:
    """Train `learner` in place with a progress bar called `title`; returns the loss of each step.

    The policy is only read. Same seed, samples and thread count give the same result.
    """
    optimiser = torch.optim.AdamW(
        learner.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay
    )
    schedule = get_cosine_schedule_with_warmup(optimiser, settings.warmup, settings.steps)
    batches, losses = epochs(samples, settings.batch_size, settings.seed), []
    with Progress() as progress:
        bar = progress.add_task(title, total=settings.steps)
        for _ in range(settings.steps):
            batch = next(batches)
            loss = draft_loss(
                learner,
                read_policy(policy, batch.tokens_BT, learner.policy_layers),
                batch,
                draft_steps=settings.draft_steps,
                step_decay=settings.step_decay,
                distance=DISTANCES[settings.loss],
            )
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
            progress.update(bar, advance=1, description=f"{title}: loss {losses[-1]:.3f}")
    return losses
