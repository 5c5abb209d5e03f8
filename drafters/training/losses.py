"""Losses of a drafter: distances between its distribution q and the policy's distribution p, for each row.

- Total variation is the objective itself: a drafted token is accepted with probability sum over tokens of min(p, q),
  which is 1 - total variation (arXiv 2211.17192).
- Soft cross-entropy bounds total variation (Pinsker), and has a gradient far from the optimum too.
- Top-k cross-entropy is soft cross-entropy with all tokens but the policy's k most likely merged into one class. It
  keeps k numbers of the policy's distribution for each row, not one for every token of the vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from drafters.learners.learner import OutputHead
from drafters.training.config import Objective

CHUNK = 1 << 24
"""logits in memory at a time (64 MiB in float32, times a handful of copies)"""
MOST = 1.0 - 1e-6


def soft_cross_entropy(policy_logprobs_NV: Tensor, draft_logprobs_NV: Tensor) -> Tensor:
    """-sum p log q [N], in nats: the forward KL(p || q) plus p's entropy, which has no gradient.

    Tokens that the drafter cannot draft (log q = -inf) are left out. So the best q is p, restricted to the other tokens
    and renormalised.
    """
    drafted_NV = draft_logprobs_NV.masked_fill(draft_logprobs_NV.isneginf(), 0.0)
    return -(policy_logprobs_NV.exp() * drafted_NV).sum(-1)


def total_variation(policy_logprobs_NV: Tensor, draft_logprobs_NV: Tensor) -> Tensor:
    """1 - sum min(p, q) [N], from 0 (equal) to 1 (disjoint)."""
    return 1.0 - torch.minimum(policy_logprobs_NV.exp(), draft_logprobs_NV.exp()).sum(-1)


def top_k_cross_entropy(policy_logprobs_NK: Tensor, ids_NK: Tensor, draft_logprobs_NV: Tensor) -> Tensor:
    """-sum over k of p log q - (1 - sum p) log(1 - sum q) [N]: soft cross-entropy over k tokens and "any other".

    Over a whole vocabulary it is at most the soft cross-entropy. At k = V both have the same gradient.
    """
    policy_NK, draft_NK = policy_logprobs_NK.exp(), draft_logprobs_NV.gather(-1, ids_NK)
    rest_N = (1.0 - policy_NK.sum(-1)).clamp(min=0.0)
    log_rest_N = torch.log1p(-draft_NK.exp().sum(-1).clamp(max=MOST))
    drafted_NK = draft_NK.masked_fill(draft_NK.isneginf(), 0.0)
    return -(policy_NK * drafted_NK).sum(-1) - rest_N * log_rest_N


Target = Callable[[Tensor], tuple[Tensor, ...]]
Distance = Callable[..., Tensor]


class DraftDistance:
    """Distance [N] between the distributions of two output heads, computed `CHUNK` logits at a time.

    The backward pass computes each chunk's logits again (activation checkpointing), so memory does not grow with rows.
    """

    def __init__(self, objective: Objective, *, top_k: int = 32, temperature: float = 1.0):
        self.objective, self.top_k, self.temperature = objective, top_k, temperature

    def targets(self, head: OutputHead, policy_BTD: Tensor) -> tuple[Tensor, ...]:
        """What is kept of the policy for all draft steps [B, T, ...]: hidden states, or its k most likely tokens."""
        if self.objective != "top_k":
            return (policy_BTD,)
        rows_ND = policy_BTD.flatten(0, 1)
        k = min(self.top_k, head.vocab_size)
        with torch.no_grad():
            parts = [head.logprobs(part, self.temperature).topk(k) for part in rows_ND.split(_rows(head))]
        shape = (*policy_BTD.shape[:2], k)
        return torch.cat([p.values for p in parts]).view(shape), torch.cat([p.indices for p in parts]).view(shape)

    def __call__(
        self, policy_head: OutputHead, targets: tuple[Tensor, ...], draft_head: OutputHead, draft_ND: Tensor
    ) -> Tensor:
        """`targets` are those of the method `targets`, at the rows of `draft_ND`."""

        def of(draft_ND: Tensor, *targets: Tensor) -> Tensor:
            draft_NV = draft_head.logprobs(draft_ND, self.temperature)
            if self.objective == "top_k":
                return top_k_cross_entropy(targets[0], targets[1], draft_NV)
            policy_NV = policy_head.logprobs(targets[0], self.temperature)
            distance = soft_cross_entropy if self.objective == "soft_cross_entropy" else total_variation
            return distance(policy_NV, draft_NV)

        rows = _rows(policy_head)
        if len(draft_ND) <= rows:
            return of(draft_ND, *targets)
        parts = zip(draft_ND.split(rows), *(target.split(rows) for target in targets), strict=True)
        return torch.cat([checkpoint(of, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])


def _rows(head: OutputHead) -> int:
    return max(1, CHUNK // head.vocab_size)
