"""CISPO (MiniMax-M1, arXiv 2506.13585, equations 4 and 5): -sg(clip(ratio)) A log pi.

The weight is clipped, not the term: every token keeps a gradient, that of REINFORCE under a bounded weight. The paper
leaves the lower side open (clip_low = 1).
"""

from rl_loop.losses.terms import LossInput, LossTerms


def cispo(batch: LossInput) -> LossTerms:
    ratio_N = (batch.logprobs_N - batch.old_logprobs_N).exp().detach()
    weight_N = ratio_N.clamp(1.0 - batch.clip_low, 1.0 + batch.clip_high)
    clipped_N = (weight_N != ratio_N) & (batch.advantages_N != 0.0)
    return LossTerms(-weight_N * batch.advantages_N * batch.logprobs_N, clipped_N)
