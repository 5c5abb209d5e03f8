"""CISPO (MiniMax-M1, arXiv 2506.13585, equations 4 and 5): -sg(clip(ratio)) A log pi.

The weight is clipped, not the term, so every token keeps a gradient: that of REINFORCE times a bounded weight. The
paper does not clip from below (clip_low = 1).
"""

from typing import Literal

from rl_loop.losses.loss import AboveZero, BelowOne, ClippedLoss
from rl_loop.losses.terms import LossInput, LossTerms


class CISPO(ClippedLoss):
    """clips each token's ratio as a constant weight, so that every token keeps a gradient"""

    kind: Literal["cispo"] = "cispo"
    clip_low: BelowOne = 1.0
    clip_high: AboveZero = 0.28

    def terms(self, batch: LossInput) -> LossTerms:
        ratio_N = (batch.logprobs_N - batch.old_logprobs_N).exp().detach()
        weight_N = ratio_N.clamp(1.0 - self.clip_low, 1.0 + self.clip_high)
        clipped_N = (weight_N != ratio_N) & (batch.advantages_N != 0.0)
        return LossTerms(-weight_N * batch.advantages_N * batch.logprobs_N, clipped_N)
