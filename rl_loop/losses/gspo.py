"""GSPO (arXiv 2507.18071, equations 5 and 7): the ratio of a whole response, clipped as a whole.

s_i = (pi(y_i) / pi_old(y_i)) ^ (1 / |y_i|), the geometric mean of its tokens' ratios; so the clip range is much
narrower than a token's (the paper's 3e-4 and 4e-4). A sequence mean of the terms is the paper's objective.
"""

import torch

from rl_loop.losses.terms import LossInput, LossTerms


def gspo(batch: LossInput) -> LossTerms:
    log_ratios = (batch.logprobs_N - batch.old_logprobs_N).split(batch.lengths)
    ratio_B = torch.stack([row.mean() for row in log_ratios]).exp()
    ratio_N = ratio_B.repeat_interleave(torch.tensor(batch.lengths, device=ratio_B.device))
    free_N = ratio_N * batch.advantages_N
    clipped_N = ratio_N.clamp(1.0 - batch.clip_low, 1.0 + batch.clip_high) * batch.advantages_N
    return LossTerms(-free_N.minimum(clipped_N), clipped_N < free_N)
