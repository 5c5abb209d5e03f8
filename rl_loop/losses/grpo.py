"""GRPO (arXiv 2402.03300, equation 3): -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), PPO's clipped term
(arXiv 1707.06347, equation 7) with group-relative advantages.

Averaged over all tokens of a batch alike, as is common since DAPO; the paper's own is `average = "sequence"`.
"""

from typing import Literal

from rl_loop.losses.loss import ClippedLoss
from rl_loop.losses.terms import LossInput, LossTerms


class GRPO(ClippedLoss):
    """each token's ratio is clipped"""

    kind: Literal["grpo"] = "grpo"

    def terms(self, batch: LossInput) -> LossTerms:
        ratio_N = (batch.logprobs_N - batch.old_logprobs_N).exp()
        free_N = ratio_N * batch.advantages_N
        clipped_N = ratio_N.clamp(1.0 - self.clip_low, 1.0 + self.clip_high) * batch.advantages_N
        return LossTerms(-free_N.minimum(clipped_N), clipped_N < free_N)
