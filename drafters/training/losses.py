"""Distances of the drafter's distribution q from the policy's p, per row: what training minimises.

Acceptance of one drafted token is sum over tokens of min(p, q) = 1 - total variation (arXiv 2211.17192), so total
variation is the aim itself; soft cross-entropy bounds it (Pinsker) and has a gradient far from the optimum as well.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]


def soft_cross_entropy(policy_logprobs_NV: Tensor, draft_logprobs_NV: Tensor) -> Tensor:
    """-sum p log q [N], in nats: the forward KL(p || q) plus p's entropy, which has no gradient.

    Tokens that the drafter cannot draft (log q = -inf) are left out, so the best q is p restricted and renormalised.
    """
    drafted_NV = draft_logprobs_NV.masked_fill(draft_logprobs_NV.isneginf(), 0.0)
    return -(policy_logprobs_NV.exp() * drafted_NV).sum(-1)


def total_variation(policy_logprobs_NV: Tensor, draft_logprobs_NV: Tensor) -> Tensor:
    """1 - sum min(p, q) [N], from 0 (equal) to 1 (disjoint)."""
    return 1.0 - torch.minimum(policy_logprobs_NV.exp(), draft_logprobs_NV.exp()).sum(-1)


DISTANCES: dict[str, Distance] = {"soft_cross_entropy": soft_cross_entropy, "total_variation": total_variation}
