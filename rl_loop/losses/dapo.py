"""DAPO (arXiv 2503.14476): GRPO's term with a wider clip range above than below ("clip-higher", equation 10).

The terms are averaged over tokens. Groups whose rewards are all equal are replaced (dynamic sampling, equation 11).
Overlong responses lose reward over the last fifth of max_tokens, as over 4,096 of 20,480 tokens in the paper
(equation 13, losses/shaping.py).
"""

from typing import Literal

from rl_loop.losses.grpo import GRPO
from rl_loop.losses.loss import AboveZero, BelowOne, Flag


class DAPO(GRPO):
    """grpo with a higher upper clip, dynamic sampling, and a penalty for overlong responses"""

    kind: Literal["dapo"] = "dapo"  # type: ignore[assignment]
    clip_high: AboveZero = 0.28
    dynamic_sampling: Flag = True
    overlong_share: BelowOne = 0.2
