"""The clipped policy loss and the KL to a reference, as pure functions of per-token log-probabilities.

N counts response tokens. Every term is a sum over N divided by `tokens`, the token count of the whole (mini)batch, so
that terms of micro-batches add up to the token-level mean.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PolicyLoss:
    loss: Tensor
    """scalar, with gradient"""
    metrics: dict[str, Tensor]
    """scalars without gradient: clip_fraction, policy_ratio, policy_kl"""


def clipped_policy_loss(
    logprobs_N: Tensor, old_logprobs_N: Tensor, advantages_N: Tensor, *, clip_low: float, clip_high: float, tokens: int
) -> PolicyLoss:
    """-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), token-level mean. PPO (arXiv 1707.06347, equation 7)
    with GRPO's advantages (arXiv 2402.03300) and clip_high of its own (DAPO, arXiv 2503.14476, equation 10).

    All inputs float32 (N,); `old_logprobs_N` and `advantages_N` carry no gradient. `clip_fraction` counts the tokens
    whose gradient the clip removes; `policy_kl` is the k3 estimate of the KL from the old to the new policy.
    """
    log_ratio_N = logprobs_N - old_logprobs_N
    ratio_N = log_ratio_N.exp()
    free_N = ratio_N * advantages_N
    clipped_N = ratio_N.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages_N
    metrics = {
        "clip_fraction": (clipped_N < free_N).float().sum() / tokens,
        "policy_ratio": ratio_N.sum() / tokens,
        "policy_kl": (ratio_N - 1.0 - log_ratio_N).sum() / tokens,
    }
    loss = -free_N.minimum(clipped_N).sum() / tokens
    return PolicyLoss(loss, {name: value.detach() for name, value in metrics.items()})


def k3_divergence(logprobs_N: Tensor, reference_logprobs_N: Tensor, *, tokens: int) -> Tensor:
    """KL(policy || reference), estimated on tokens of the policy: mean of exp(d) - d - 1 with d = reference - policy.

    Unbiased and never negative (k3 of http://joschu.net/blog/kl-approx.html; GRPO's equation 4). Inputs float32 (N,).
    """
    difference_N = reference_logprobs_N - logprobs_N
    return (difference_N.exp() - difference_N - 1.0).sum() / tokens
