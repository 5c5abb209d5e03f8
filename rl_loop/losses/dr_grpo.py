"""Dr. GRPO (arXiv 2503.20783): GRPO's term without its two biases.

- A response's terms are summed and divided by a constant, max_tokens (`loss_average = "constant"`), so that long wrong
  responses are not punished less.
- Advantages are not divided by the group's standard deviation (`normalise_advantages = false`), so that very easy and
  very hard prompts do not weigh more.
"""

from rl_loop.losses.grpo import grpo
from rl_loop.losses.terms import LossInput, LossTerms


def dr_grpo(batch: LossInput) -> LossTerms:
    return grpo(batch)
