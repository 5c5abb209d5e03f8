"""DAPO (arXiv 2503.14476): GRPO's term, clipped higher above than below ("clip-higher", equation 10), a token mean.

Its other two parts choose what is trained on: groups whose rewards are all equal are replaced (dynamic sampling,
equation 11), and overlong responses lose reward over the last fifth of max_tokens, as over the paper's 4,096 of 20,480
(equation 13, losses/shaping.py).
"""

from typing import Literal

from rl_loop.losses.grpo import GRPO
from rl_loop.losses.loss import AboveZero, BelowOne, Flag


class DAPO(GRPO):
    """grpo, clipped higher above, on groups and rewards that are chosen so"""

    kind: Literal["dapo"] = "dapo"  # type: ignore[assignment]
    clip_high: AboveZero = 0.28
    dynamic_sampling: Flag = True
    overlong_share: BelowOne = 0.2
