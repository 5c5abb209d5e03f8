"""What acceptance an engine will measure, predicted from forward passes over samples of the policy.

A drafted token is accepted with probability min(1, q / p), and accepted or replaced, the token that stands in the end
is the policy's. So, given a sample, the m-th draft from row i is accepted with min(1, q(x) / p(x)) at the token x that
stands there, independently of the others. That gives, without drafting anything,

- the chance that all drafts before the m-th were accepted: the product of those ratios;
- the chance that the m-th is accepted as well, averaged over its token: sum min(p, q) = 1 - total variation;
- how often the engine starts to draft from row i: it does so from the first token of the response, and m + 1 rows
  after every start that accepted exactly m.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from drafters.learners.learner import Learner, read_policy, shifted
from drafters.training.losses import total_variation
from drafters.training.samples import Batch, Sample, collate


@torch.no_grad()
def predicted_acceptance(
    learner: Learner, policy: PreTrainedModel, samples: list[Sample], draft_tokens: int, batch_size: int = 64
) -> list[float]:
    """Share of draft steps that accept at least 1..draft_tokens tokens at temperature 1, probabilistic drafts.

    One plus their sum is the acceptance length. Drafts past the end of a response count as refused; an engine
    counts some of them as accepted, which is a difference in the last step of a completion only.
    """
    accepted, starts = torch.zeros(draft_tokens), torch.zeros(())
    for first in range(0, len(samples), batch_size):
        batch = collate(samples[first : first + batch_size])
        ratios, overlaps = _ratios_and_overlaps(learner, policy, batch, draft_tokens)
        before = torch.cat([torch.ones_like(ratios[:1]), ratios.cumprod(0)])
        visits_BT = _visits(before, batch.drafted(0))
        accepted += (visits_BT * before[:-1] * overlaps).sum((1, 2))
        starts += visits_BT.sum()
    return (accepted / starts).tolist()


def _ratios_and_overlaps(learner: Learner, policy: PreTrainedModel, batch: Batch, steps: int) -> tuple[Tensor, Tensor]:
    """min(1, q(x) / p(x)) at the sampled token and 1 - total variation, each [steps, B, T], zero past the end."""
    outputs = read_policy(policy, batch.tokens_BT, learner.policy_layers)
    ratios, overlaps = [], []
    for j, draft_BTV in enumerate(learner.draft_logprobs(batch.tokens_BT, outputs, steps)):
        policy_BTV, token_BT1 = shifted(outputs.logprobs_BTV, j + 1), shifted(batch.tokens_BT, j + 2)[..., None]
        ratio_BT = (draft_BTV.gather(-1, token_BT1) - policy_BTV.gather(-1, token_BT1)).exp().clamp(max=1.0)[..., 0]
        ratios.append(ratio_BT * batch.drafted(j))
        overlaps.append((1.0 - total_variation(policy_BTV, draft_BTV)) * batch.drafted(j))
    return torch.stack(ratios), torch.stack(overlaps)


def _visits(before: Tensor, rows_BT: Tensor) -> Tensor:
    """Expected number of draft steps that start at each row; `before[m]` is the chance to accept at least m."""
    exactly = before - torch.cat([before[1:], torch.zeros_like(before[:1])])
    width = rows_BT.shape[1]
    visits_BT = torch.zeros(rows_BT.shape)
    first_B = rows_BT.int().argmax(1)
    visits_BT[torch.arange(len(first_B)), first_B] = rows_BT.any(1).float()
    for i in range(width):
        for m in range(min(len(exactly), width - i - 1)):
            visits_BT[:, i + m + 1] += visits_BT[:, i] * exactly[m, :, i]
    return visits_BT * rows_BT
