"""Dr. GRPO (arXiv 2503.20783): GRPO's term without its two biases.

- A response's terms are summed and divided by the constant max_tokens. A mean over the response's own length would
  punish long wrong responses less.
- Advantages are not divided by the group's standard deviation, which would give more weight to very easy and very hard
  prompts.
"""

from typing import Literal

from rl_loop.losses.grpo import GRPO
from rl_loop.losses.loss import Average, Flag


class DrGRPO(GRPO):
    """grpo without its biases of length and of difficulty"""

    kind: Literal["dr_grpo"] = "dr_grpo"  # type: ignore[assignment]
    average: Average = "constant"
    normalise_advantages: Flag = False
