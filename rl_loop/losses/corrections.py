"""Corrections: constant weights of loss terms, for tokens that an older policy sampled.

Let q be the sampling policy, pi_prox the policy before the step, and pi the trained policy. The decoupled objective
(arXiv 2110.00641; AReaL, arXiv 2505.24298, equation 5) clips pi / pi_prox and weighs each token by pi_prox / q:

    decoupled       pi_prox / q
    truncated       min(pi_prox / q, high): truncated importance sampling (V-trace, arXiv 1802.01561)
    icepop          pi_prox / q within [low, high], else 0 (IcePop, arXiv 2510.18855)
    sequence_mask   pi_prox / q, or 0 for all of a response whose geometric mean ratio is outside [low, high]

With `proximal = "sampling"` the clipped ratio is pi / q; then only the masks apply. A token is off-policy if its weight
version is older than the trained policy's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rl_loop.batching import Rollout
from rl_loop.losses.correction_config import CorrectionConfig, IcePop, SequenceMask, Truncated, Weighing

LARGEST_LOG_RATIO = 20.0
"""larger log ratios are cut to this, so that squares of ratios stay finite in float32"""


@dataclass(frozen=True)
class CorrectionMetrics:
    """Metrics over all tokens of a step."""

    staleness: list[int]
    """number of tokens that are 0, 1, 2, ... versions older than the trained policy"""
    importance_ratio: float
    """mean of pi_prox / q"""
    effective_sample_size: float
    """(sum of ratios)^2 / (tokens x sum of squares); 1 when all tokens count alike"""
    masked: float
    """share of tokens whose weight is 0"""


@dataclass(frozen=True)
class Correction:
    weights: list[Tensor] | None
    """the weights of each rollout's tokens, float32; None when all are 1"""
    metrics: CorrectionMetrics


def correct(
    config: CorrectionConfig, rollouts: Sequence[Rollout], proximal: Sequence[Tensor], version: int
) -> Correction:
    """The correction of one batch. `proximal`: the log-probabilities of each rollout's tokens under the policy before
    the step, after temperature, top-k and top-p, as they were sampled. `version`: that policy's version."""
    ages = [staleness(rollout, version) for rollout in rollouts]
    pairs = zip(proximal, rollouts, strict=True)
    log_ratios = [(p.float() - torch.tensor(r.logprobs)).clamp(max=LARGEST_LOG_RATIO) for p, r in pairs]
    all_ages, ratio = torch.cat(ages), torch.cat(log_ratios).exp()
    weights = None
    if isinstance(config, Weighing) and (config.tokens == "all" or bool((all_ages > 0).any())):
        weights = [weights_of(config, *row) for row in zip(log_ratios, ages, strict=True)]
    return Correction(
        weights,
        CorrectionMetrics(
            staleness=torch.bincount(all_ages).tolist(),
            importance_ratio=ratio.mean().item(),
            # It is at most 1 (Cauchy-Schwarz), but float32 sums of ratios near 1 may round to more.
            effective_sample_size=(ratio.sum().square() / (len(ratio) * ratio.square().sum())).clamp(max=1.0).item(),
            masked=0.0 if weights is None else (torch.cat(weights) == 0.0).float().mean().item(),
        ),
    )


def staleness(rollout: Rollout, version: int) -> Tensor:
    """int64 (T,): how many versions older than `version` each token is. It is 0 where versions are not known, and where
    they are newer: a recording's versions were counted by another run."""
    if not rollout.versions:
        return torch.zeros(len(rollout.response_ids), dtype=torch.long)
    return (version - torch.tensor(rollout.versions)).clamp(min=0)


def weights_of(config: Weighing, log_ratio_T: Tensor, ages_T: Tensor) -> Tensor:
    """The weights of one response's tokens, float32 (T,)."""
    corrected_T = ages_T > 0 if config.tokens == "off_policy" else torch.ones_like(ages_T, dtype=torch.bool)
    log_ratio_T = torch.where(corrected_T, log_ratio_T, 0.0)
    ratio_T = log_ratio_T.exp()
    weight_T = torch.ones_like(ratio_T) if config.proximal == "sampling" else ratio_T
    match config:
        case Truncated():
            return weight_T.clamp(max=config.high)
        case IcePop():
            within_T = (ratio_T >= config.low) & (ratio_T <= config.high)
            return torch.where(within_T | ~corrected_T, weight_T, 0.0)
        case SequenceMask() if corrected_T.any():
            mean = log_ratio_T[corrected_T].mean().exp()
            return weight_T if config.low <= mean <= config.high else torch.zeros_like(weight_T)
    return weight_T
