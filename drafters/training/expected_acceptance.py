"""Expected acceptance of an engine, predicted from forward passes over samples of the policy.

An engine accepts a drafted token with probability min(1, p / q). Whether it is accepted or replaced, the token in the
response follows the policy. So, given a sample with token x at a position, the draft token at that position was
accepted with probability min(1, q(x) / p(x)), independently of the other positions. Without drafting, this gives

- the probability that all draft tokens before the m-th are accepted: the product of those ratios;
- the probability that the m-th is accepted as well, averaged over its value: sum min(p, q) = 1 - total variation;
- the expected number of draft steps that start at row i: one starts at the first token of the response, and another
  m + 1 rows after every start that accepted exactly m.

Greedy drafts are drawn from the distribution that is one at the drafter's most likely token and zero elsewhere.

An engine also drafts past the end of a response and counts the tokens accepted there. A sample says nothing about
those. So a start counts at a position only if the draft token at that position is within the response.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from drafters.drafter import DraftSampling
from drafters.learners.learner import DrafterLearner, OutputHead, PolicyOutputs, read_policy, shifted
from drafters.training.losses import CHUNK, total_variation
from drafters.training.samples import Sample, SampleBatch, collate


class PredictedAcceptance:
    """Sums over batches. `by_position` holds the shares of draft steps that accept at least 1, 2, ... tokens."""

    def __init__(self, draft_tokens: int, temperature: float = 1.0, draft_sampling: DraftSampling = "probabilistic"):
        self.draft_tokens, self.temperature, self.draft_sampling = draft_tokens, temperature, draft_sampling
        self.accepted, self.starts = torch.zeros(draft_tokens), torch.zeros(draft_tokens)

    @torch.no_grad()
    def add(self, states: list[Tensor], head: OutputHead, policy: PolicyOutputs, batch: SampleBatch) -> None:
        """Adds a batch: the drafter's states [B, T, D] at each draft step, and the head that reads them."""
        ratios, overlaps = self._ratios_and_overlaps(states, head, policy, batch)
        before = torch.cat([torch.ones_like(ratios[:1]), ratios.cumprod(0)])
        visits_BT = _visits(before, batch.drafted(0))
        within = torch.stack([batch.drafted(j) for j in range(self.draft_tokens)])
        self.accepted += (visits_BT * before[:-1] * overlaps).sum((1, 2)).cpu()
        self.starts += (visits_BT * within).sum((1, 2)).cpu()

    @property
    def by_position(self) -> list[float]:
        return (self.accepted / self.starts.clamp(min=1e-9)).tolist()

    @property
    def length(self) -> float:
        return 1.0 + sum(self.by_position)

    def _ratios_and_overlaps(
        self, states: list[Tensor], head: OutputHead, policy: PolicyOutputs, batch: SampleBatch
    ) -> tuple[Tensor, Tensor]:
        """min(1, q(x) / p(x)) at the sampled token, and 1 - total variation; each [steps, B, T], zero past the end."""
        shape = (self.draft_tokens, *batch.tokens_BT.shape)
        ratios, overlaps = (torch.zeros(shape, device=batch.tokens_BT.device) for _ in range(2))
        for j, states_BTD in enumerate(states):
            rows = batch.drafted(j)
            tokens_N = shifted(batch.tokens_BT, j + 2)[rows]
            policy_ND, draft_ND = shifted(policy.output_BTD, j + 1)[rows], states_BTD[rows]
            ratios[j][rows], overlaps[j][rows] = self._compared(policy.head, policy_ND, head, draft_ND, tokens_N)
        return ratios, overlaps

    def _compared(
        self, policy_head: OutputHead, policy_ND: Tensor, head: OutputHead, draft_ND: Tensor, tokens_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        ratios, overlaps = [], []
        rows = max(1, CHUNK // policy_head.vocab_size)
        for p_ND, q_ND, token_N in zip(policy_ND.split(rows), draft_ND.split(rows), tokens_N.split(rows), strict=True):
            p_NV = policy_head.logprobs(p_ND, self.temperature)
            q_NV = self._drawn_from(head.logprobs(q_ND, self.temperature))
            at_token = (q_NV.gather(-1, token_N[:, None]) - p_NV.gather(-1, token_N[:, None]))[:, 0]
            ratios.append(at_token.exp().clamp(max=1.0))
            overlaps.append(1.0 - total_variation(p_NV, q_NV))
        return torch.cat(ratios), torch.cat(overlaps)

    def _drawn_from(self, logprobs_NV: Tensor) -> Tensor:
        """The log-probabilities of the distribution that drafts are drawn from."""
        if self.draft_sampling == "probabilistic":
            return logprobs_NV
        return torch.full_like(logprobs_NV, -torch.inf).scatter(-1, logprobs_NV.argmax(-1, keepdim=True), 0.0)


def predicted_acceptance(
    learner: DrafterLearner,
    policy: PreTrainedModel,
    samples: list[Sample],
    draft_tokens: int,
    *,
    temperature: float = 1.0,
    draft_sampling: DraftSampling = "probabilistic",
) -> list[float]:
    """Shares of draft steps that accept at least 1..draft_tokens tokens, at `temperature`.

    The acceptance length is one plus their sum.
    """
    ways = [draft_sampling]
    return acceptance_by_sampling(learner, policy, samples, draft_tokens, ways, temperature=temperature)[draft_sampling]


@torch.no_grad()
def acceptance_by_sampling(
    learner: DrafterLearner,
    policy: PreTrainedModel,
    samples: list[Sample],
    draft_tokens: int,
    draft_sampling: Sequence[DraftSampling],
    *,
    temperature: float = 1.0,
    batch_size: int = 64,
) -> dict[DraftSampling, list[float]]:
    """`predicted_acceptance` for each way to sample drafts, from the same forward passes."""
    predicted = {way: PredictedAcceptance(draft_tokens, temperature, way) for way in draft_sampling}
    for first in range(0, len(samples), batch_size):
        batch = collate(samples[first : first + batch_size]).to(policy.device)
        outputs = read_policy(policy, batch.tokens_BT, learner.policy_layers)
        states = learner.draft_states(batch.tokens_BT, outputs, draft_tokens)
        for of_way in predicted.values():
            of_way.add(states, learner.output_head(outputs), outputs, batch)
    return {way: of_way.by_position for way, of_way in predicted.items()}


def _visits(before: Tensor, rows_BT: Tensor) -> Tensor:
    """Expected number of draft steps that start at each row. `before[m]` is the probability to accept at least m."""
    exactly = before - torch.cat([before[1:], torch.zeros_like(before[:1])])
    width = rows_BT.shape[1]
    visits_BT = torch.zeros(rows_BT.shape, device=rows_BT.device)
    first_B = rows_BT.int().argmax(1)
    visits_BT[torch.arange(len(first_B)), first_B] = rows_BT.any(1).float()
    for i in range(width):
        for m in range(min(len(exactly), width - i - 1)):
            visits_BT[:, i + m + 1] += visits_BT[:, i] * exactly[m, :, i]
    return visits_BT * rows_BT
