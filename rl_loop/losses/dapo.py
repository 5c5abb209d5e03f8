"""DAPO (arXiv 2503.14476): GRPO's term with clip_high above clip_low ("clip-higher", equation 10), a token mean.

Its other two parts are no part of the term: dynamic sampling (equation 11, `dynamic_sampling`: groups whose rewards are
all equal are replaced) and overlong reward shaping (equation 13, `overlong_buffer`: rl_loop/losses/shaping.py).
"""

from rl_loop.losses.grpo import grpo
from rl_loop.losses.terms import LossInput, LossTerms


def dapo(batch: LossInput) -> LossTerms:
    return grpo(batch)
