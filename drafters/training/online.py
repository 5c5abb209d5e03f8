"""Online training of a drafter while its policy is trained, on hidden states from the policy's own forward pass.

Nothing here affects the policy. The hidden states carry no gradient. The drafter has its own optimiser and clipping. No
random number comes from a generator that the policy's training uses.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from drafters.learners.learner import DrafterLearner, PolicyOutputs
from drafters.training.config import OnlineTraining
from drafters.training.losses import DraftDistance
from drafters.training.offline import draft_loss
from drafters.training.samples import SampleBatch


@dataclass
class UpdateRule:
    """Whether a step trains the drafter: every m-th step, or by the acceptance length with hysteresis.

    Training starts when the acceptance length falls below `start_below` times the best one so far. It goes on until the
    length is above `stop_above` times the best. Training a drafter that is still good would be wasted work, and with
    one threshold the noise of each step would switch training on and off.

    Example: with 0.95 and 0.98, lengths 3.0, 2.9, 2.8, 2.9, 2.96 train in the third and fourth step only.
    """

    settings: OnlineTraining
    best: float = 0.0
    is_behind: bool = False
    last: int | None = None
    """the last step that trained the drafter"""

    def is_due(self, step: int, acceptance_length: float | None) -> bool:
        """`acceptance_length` is that of the step's rollouts. If it is unknown (None), an adaptive drafter trains."""
        if acceptance_length is None:
            self.is_behind = True
        else:
            self.best = max(self.best, acceptance_length)
            threshold = self.settings.stop_above if self.is_behind else self.settings.start_below
            self.is_behind = acceptance_length < threshold * self.best
        wanted = {"every": True, "adaptive": self.is_behind, "never": False}[self.settings.when]
        due = wanted and (self.last is None or step - self.last >= self.settings.every)
        if due:
            self.last = step
        return due


class OnlineTrainer:
    """The learner and its optimiser. `temperature` is the one at which the policy samples."""

    def __init__(self, learner: DrafterLearner, settings: OnlineTraining, temperature: float):
        self.learner, self.settings = learner, settings
        self.distance = DraftDistance(settings.loss, top_k=settings.top_k, temperature=temperature)
        self.optimiser = torch.optim.AdamW(
            learner.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay
        )
        self.updates = 0
        """optimiser updates since the start of the run"""

    def learn(self, policy: PolicyOutputs, batch: SampleBatch, seed: str) -> Iterator[tuple[float, float]]:
        """Makes an update for every `tokens_per_update` tokens. Yields the loss and the gradient norm of each."""
        for part in _parts(batch, self.settings.tokens_per_update, seed):
            of_part = SampleBatch(batch.tokens_BT[part], batch.response_BT[part])
            if not of_part.drafted(0).any():
                continue
            read = replace(
                policy, output_BTD=policy.output_BTD[part], layers_BTD=tuple(h[part] for h in policy.layers_BTD)
            )
            yield self._update(read, of_part)

    @torch.enable_grad()
    def _update(self, policy: PolicyOutputs, batch: SampleBatch) -> tuple[float, float]:
        settings = self.settings
        loss = draft_loss(
            self.learner,
            policy,
            batch,
            draft_steps=settings.draft_steps,
            step_decay=settings.step_decay,
            distance=self.distance,
        )
        self.updates += 1
        rising = min(1.0, self.updates / settings.warmup) if settings.warmup else 1.0
        self.optimiser.param_groups[0]["lr"] = settings.learning_rate * rising
        self.optimiser.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.learner.parameters(), settings.max_grad_norm)
        self.optimiser.step()
        return loss.item(), norm.item()


def _parts(batch: SampleBatch, tokens: int, seed: str) -> list[Tensor]:
    """The row indices of each update, in an order that `seed` decides."""
    rows = list(range(len(batch.tokens_BT)))
    random.Random(seed).shuffle(rows)
    size = max(1, tokens // batch.tokens_BT.shape[1])
    return [torch.tensor(rows[i : i + size], device=batch.tokens_BT.device) for i in range(0, len(rows), size)]
