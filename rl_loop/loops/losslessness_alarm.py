"""Losslessness alarm in training: it is raised when the samples do not follow the policy."""

from collections.abc import Callable

from drafters.scoring import SurprisalSums
from rl_loop.config import TrainConfig


class NotLossless(RuntimeError):
    """The running z passed its limit, and `losslessness_alarm` is "stop"."""


def check_losslessness(config: TrainConfig, sums: SurprisalSums, step: int, alarm: Callable[[str], None]) -> None:
    """`sums`: over all sampled tokens up to `step`. If the running z is beyond the limit, this calls `alarm` or raises
    NotLossless."""
    if abs(sums.z) < config.losslessness_limit:
        return
    message = (
        f"after step {step} the running z of {sums.tokens:,} sampled tokens is {sums.z:+.1f}, beyond "
        f"losslessness_limit = {config.losslessness_limit:g}: the service's samples do not follow the policy. "
        "`rollout-service audit --endpoint URL` finds where they differ"
    )
    if config.losslessness_alarm == "stop":
        raise NotLossless(message)
    alarm(message)
