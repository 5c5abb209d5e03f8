"""Policy losses, one a file, and how their per-token terms become one number. `TrainConfig.loss` names one.

A loss sees log-probabilities, advantages and lengths of a micro-batch, and knows nothing of where they come from. Terms
are summed and divided by a figure of the whole (mini)batch, so that those of micro-batches add up.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from rl_loop.losses.cispo import cispo
from rl_loop.losses.dapo import dapo
from rl_loop.losses.dr_grpo import dr_grpo
from rl_loop.losses.grpo import grpo
from rl_loop.losses.gspo import gspo
from rl_loop.losses.objective import Average, LossName
from rl_loop.losses.terms import LossInput, LossTerms

LOSSES: dict[LossName, Callable[[LossInput], LossTerms]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "gspo": gspo,
    "cispo": cispo,
}


@dataclass(frozen=True)
class Totals:
    """Of the whole (mini)batch that the micro-batch is a part of."""

    tokens: int
    sequences: int
    longest: int
    """tokens that a response may have, sampling.max_tokens"""


@dataclass(frozen=True)
class PolicyLoss:
    loss: Tensor
    """scalar, with gradient"""
    metrics: dict[str, Tensor]
    """scalars without gradient, token means: clip_fraction, policy_ratio, policy_kl (k3, old policy to new)"""


def policy_loss(
    name: LossName, batch: LossInput, totals: Totals, average: Average, weights_N: Tensor | None = None
) -> PolicyLoss:
    """The micro-batch's part of the named loss. `weights_N` are constant factors of the terms (losses/corrections.py).

    `average`: token, all tokens weigh alike; sequence, all responses do; constant, a sum over max_tokens a response.
    """
    terms = LOSSES[name](batch)
    loss_N = terms.loss_N if weights_N is None else terms.loss_N * weights_N
    match average:
        case "token":
            loss = loss_N.sum() / totals.tokens
        case "sequence":
            loss = (loss_N / batch.lengths_N).sum() / totals.sequences
        case "constant":
            loss = loss_N.sum() / (totals.sequences * totals.longest)
    log_ratio_N = batch.logprobs_N - batch.old_logprobs_N
    ratio_N = log_ratio_N.exp()
    metrics = {
        "clip_fraction": terms.clipped_N.float().sum() / totals.tokens,
        "policy_ratio": ratio_N.sum() / totals.tokens,
        "policy_kl": (ratio_N - 1.0 - log_ratio_N).sum() / totals.tokens,
    }
    return PolicyLoss(loss, {key: value.detach() for key, value in metrics.items()})
