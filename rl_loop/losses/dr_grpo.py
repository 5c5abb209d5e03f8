"""Dr. GRPO (arXiv 2503.20783): GRPO's term without its two biases.

- A response's terms are summed and divided by a constant, max_tokens, so that long wrong responses are not punished
  less.
- Advantages are not divided by the group's standard deviation, so that very easy and very hard prompts do not weigh
  more.
"""

from typing import Literal

from rl_loop.losses.grpo import GRPO
from rl_loop.losses.loss import Average, Flag


class DrGRPO(GRPO):
    """grpo without its biases"""

    kind: Literal["dr_grpo"] = "dr_grpo"  # type: ignore[assignment]
    average: Average = "constant"
    normalise_advantages: Flag = False
