"""Alarm on collapsed experts: those that a router has almost stopped choosing.

An expert that no token chooses gets no gradient. It falls behind, and is chosen even less: the collapse feeds itself.

- Only a lower limit is tested. Where a router favours few experts, the others of its layer go without. One expert that
  many tokens choose is no fault as long as the others have their part.
- Shares are taken over the latest steps together, so that one step of unusual prompts raises no alarm.
- They are judged once chance cannot explain an empty expert: when an expert at the limit would have been chosen by
  LEAST tokens, even with one expert a token.
"""

from collections.abc import Callable, Sequence

import numpy as np

from rl_loop.config import TrainConfig
from rl_loop.reports.metrics import StepMetrics

STEPS = 10
LEAST = 3
NAMED = 5
"""how many experts the alarm names"""


class CollapsedExperts(RuntimeError):
    """An expert is below `expert_limit`, and `expert_alarm` is "stop"."""


def check_experts(config: TrainConfig, steps: Sequence[StepMetrics], alarm: Callable[[str], None]) -> None:
    """`steps`: of the run so far. If an expert's share of the latest of them is below the limit, this calls `alarm` or
    raises CollapsedExperts."""
    if not steps[-1].expert_load:
        return
    latest = [metrics for metrics in steps[-STEPS:] if metrics.expert_load]
    tokens = [metrics.tokens for metrics in latest]
    loads_LE = np.average([metrics.expert_load for metrics in latest], axis=0, weights=tokens)
    experts = loads_LE.shape[1]
    if config.expert_limit * sum(tokens) / experts < LEAST:
        return
    shares = {at: load * experts for at, load in np.ndenumerate(loads_LE) if load * experts < config.expert_limit}
    if not shares:
        return
    lowest = sorted(shares, key=lambda at: shares[at])
    named = ", ".join(f"layer {at[0]} expert {at[1]} ({shares[at]:.2%})" for at in lowest[:NAMED])
    message = (
        f"after step {steps[-1].step}, {len(shares)} of {loads_LE.size} experts were chosen for less than "
        f"expert_limit = {config.expert_limit:g} of an equal share of the tokens of {len(latest)} steps. The lowest: "
        f"{named}. Raise router_coefficient and go on from an earlier checkpoint; lower expert_limit if the task needs "
        "few experts"
    )
    if config.expert_alarm == "stop":
        raise CollapsedExperts(message)
    alarm(message)
