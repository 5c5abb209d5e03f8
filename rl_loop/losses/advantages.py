"""Group-relative advantages (GRPO, arXiv 2402.03300, section 4.1): each reward is compared with those of its group."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

EPSILON = 1e-6


@dataclass(frozen=True)
class Advantages:
    """Example: rewards [[1, 0], [1, 1]] give values [[1, -1], [0, 0]] and one group of zero variance."""

    values: list[list[float]]
    """one list per group, in the order of its rewards"""
    zero_variance_groups: int
    """groups whose rewards are all equal, so that they give no gradient"""


def group_advantages(rewards: Sequence[Sequence[float]], normalise: bool = True) -> Advantages:
    """(r - mean) / (std + 1e-6) within each group, with the population standard deviation.

    Without `normalise`, it is r - mean (Dr. GRPO, arXiv 2503.20783); very hard and very easy prompts then weigh less.
    """
    values, zero_variance = [], 0
    for group in rewards:
        centred = np.asarray(group, dtype=np.float64) - np.mean(group)
        if np.ptp(group) == 0.0:
            zero_variance += 1
            centred[:] = 0.0
        elif normalise:
            centred = centred / (np.std(group) + EPSILON)
        values.append(centred.tolist())
    return Advantages(values, zero_variance)
