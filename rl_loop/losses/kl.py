"""The KL divergence to a reference policy, estimated from per-token log-probabilities."""

from torch import Tensor


def k3_divergence(logprobs_N: Tensor, reference_logprobs_N: Tensor, *, tokens: int) -> Tensor:
    """KL(policy || reference), estimated on tokens of the policy: mean of exp(d) - d - 1 with d = reference - policy.

    The estimate is unbiased and never negative (k3 of http://joschu.net/blog/kl-approx.html; GRPO's equation 4). Inputs
    are float32 (N,). The sum is divided by `tokens`, so that the terms of micro-batches add up to the mean.
    """
    difference_N = reference_logprobs_N - logprobs_N
    return (difference_N.exp() - difference_N - 1.0).sum() / tokens
