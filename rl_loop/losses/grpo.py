"""GRPO (arXiv 2402.03300, equation 3): PPO's clipped term with group-relative advantages.

The term is -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) (arXiv 1707.06347, equation 7). By default it is
averaged over all tokens of a batch, as is common since DAPO. The paper averages by sequence: `average = "sequence"`.
"""

from typing import Literal

from rl_loop.losses.loss import ClippedLoss
from rl_loop.losses.terms import LossInput, LossTerms


class GRPO(ClippedLoss):
    """clips each token's ratio"""

    kind: Literal["grpo"] = "grpo"

    def terms(self, batch: LossInput) -> LossTerms:
        ratio_N = (batch.logprobs_N - batch.old_logprobs_N).exp()
        free_N = ratio_N * batch.advantages_N
        clipped_N = ratio_N.clamp(1.0 - self.clip_low, 1.0 + self.clip_high) * batch.advantages_N
        return LossTerms(-free_N.minimum(clipped_N), clipped_N < free_N)
