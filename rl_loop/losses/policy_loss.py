"""Reduction of a policy loss: its per-token terms become one number.

A loss sees only the log-probabilities, advantages and lengths of a micro-batch. Terms are summed and divided by a total
of the whole (mini)batch, so that the parts of micro-batches add up.
"""

from dataclasses import dataclass

from torch import Tensor

from rl_loop.losses.loss import Loss
from rl_loop.losses.terms import LossInput


@dataclass(frozen=True)
class Totals:
    """Totals of the (mini)batch that the micro-batch is a part of."""

    tokens: int
    sequences: int
    longest: int
    """the most tokens that a response may have, sampling.max_tokens"""


@dataclass(frozen=True)
class PolicyLoss:
    loss: Tensor
    """scalar, with gradient"""
    metrics: dict[str, Tensor]
    """means over tokens, scalars without gradient: clip_fraction, policy_ratio, policy_kl (k3, from the old policy to
    the new)"""


def policy_loss(loss: Loss, batch: LossInput, totals: Totals, weights_N: Tensor | None = None) -> PolicyLoss:
    """The micro-batch's part of the loss. `weights_N` are constant factors of the terms (losses/corrections.py)."""
    terms = loss.terms(batch)
    loss_N = terms.loss_N if weights_N is None else terms.loss_N * weights_N
    match loss.average:
        case "token":
            mean = loss_N.sum() / totals.tokens
        case "sequence":
            mean = (loss_N / batch.lengths_N).sum() / totals.sequences
        case "constant":
            mean = loss_N.sum() / (totals.sequences * totals.longest)
    log_ratio_N = batch.logprobs_N - batch.old_logprobs_N
    ratio_N = log_ratio_N.exp()
    metrics = {
        "clip_fraction": terms.clipped_N.float().sum() / totals.tokens,
        "policy_ratio": ratio_N.sum() / totals.tokens,
        "policy_kl": (ratio_N - 1.0 - log_ratio_N).sum() / totals.tokens,
    }
    return PolicyLoss(mean, {key: value.detach() for key, value in metrics.items()})
