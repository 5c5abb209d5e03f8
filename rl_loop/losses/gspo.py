"""GSPO (arXiv 2507.18071, equations 5 and 7): the ratio of a whole response, clipped as a whole.

The ratio is s_i = (pi(y_i) / pi_old(y_i)) ^ (1 / |y_i|), the geometric mean of the response's token ratios. Its clip
range is therefore much narrower than a token's. The paper's objective averages the terms by sequence.
"""

from typing import Literal

from rl_loop.losses.loss import AboveZero, Average, BelowOne, ClippedLoss
from rl_loop.losses.terms import LossInput, LossTerms


class GSPO(ClippedLoss):
    """clips the ratio of each whole response"""

    kind: Literal["gspo"] = "gspo"
    average: Average = "sequence"
    clip_low: BelowOne = 3e-4
    clip_high: AboveZero = 4e-4

    def terms(self, batch: LossInput) -> LossTerms:
        ratio_N = batch.spread_N(batch.response_means_B(batch.logprobs_N - batch.old_logprobs_N).exp())
        free_N = ratio_N * batch.advantages_N
        clipped_N = ratio_N.clamp(1.0 - self.clip_low, 1.0 + self.clip_high) * batch.advantages_N
        return LossTerms(-free_N.minimum(clipped_N), clipped_N < free_N)
