"""Alarms for a stale, half-loaded or outdated drafter: samples stay right and only come slower, so nobody would notice.

An alarm is raised at a push when
- an engine read other bytes than were sent, and so refused them;
- an update differs from what was in service, but changes nothing that an engine's kernels hold;
- a new drafter version does not differ from the one before.

One is also raised when the acceptance rate is much lower than with the pair of versions just before, once enough draft
steps are counted. `check_acceptance` finds it: GET /metrics, GET /v1/speculation and the end of a rollout stream call
it. A slow decline over many versions raises none.

An alarm is raised once for its versions. It is a log line, an increment of the counter
`rollout_speculation_alarms_total{kind}`, and an entry of GET /v1/speculation, which shows the newest ALARMS_KEPT.
"""

import logging
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from rollout_service.config import AlarmConfig
from rollout_service.engine.loading import Loaded
from rollout_service.protocol import AlarmKind, SpeculationAlarm, WeightsOf

logger = logging.getLogger("rollout_service")

ALARMS_KEPT = 100
FALLS_KEPT = 1000
"""pairs of versions whose fall was reported; more than the engines count apart"""


class Alarms:
    def __init__(self, config: AlarmConfig, on_alarm: Callable[[AlarmKind], None] = lambda kind: None):
        self.config, self.on_alarm = config, on_alarm
        self.raised: list[SpeculationAlarm] = []
        self._fallen: dict[tuple[int, int], None] = {}  # pairs of versions whose fall was reported, in that order

    def after_push(
        self,
        of: WeightsOf,
        policy: int,
        drafter: int,
        *,
        is_new: bool | None,
        loaded: dict[int, Loaded],
    ) -> None:
        """`policy` and `drafter` are the versions now in service. `is_new` says whether the update differs from what
        was in service (None: not known). `loaded` is what each engine's `load` returned, by index."""
        version = drafter if of == "drafter" else policy
        if of == "drafter" and is_new is False:
            message = (
                f"drafter version {version} holds the same tensors as the version before it: "
                "its trainer pushed what was in service already"
            )
            self._raise("not_changed", of, policy, drafter, message)
        for engine, report in loaded.items():
            if is_new and report.changed == 0:
                message = (
                    f"{of} version {version} changed none of the {report.modules} modules of engine {engine}, "
                    "although its tensors differ from those before: the engine still uses the old ones"
                )
                self._raise("not_changed", of, policy, drafter, message)

    def different_bytes(self, of: WeightsOf, policy: int, drafter: int, engine: int, error: str) -> None:
        """Raise the alarm for an engine that refused what the others loaded."""
        version = drafter if of == "drafter" else policy
        self._raise("checksum", of, policy, drafter, f"engine {engine}, {of} version {version}: {error}")

    def check_acceptance(self, rows: Sequence[dict[str, Any]]) -> None:
        """`rows` as `Fleet.speculation` returns them. Both versions only grow, so their order is that of the pushes.
        Pairs that are no longer counted apart were judged while they were."""

        def versions(row: dict[str, Any]) -> tuple[int, int]:
            return row["policy_version"], row["drafter_version"]

        counted_apart = [row for row in rows if row["policy_version"] is not None]
        before: tuple[tuple[int, int], float] | None = None
        for pair, of_pair in groupby(sorted(counted_apart, key=versions), key=versions):
            counts = list(of_pair)
            # Only first drafts count, because the rate of all drafts also falls when a schedule makes drafts longer.
            steps, accepted = (sum(r["draft_steps"] for r in counts), sum(r["accepted_by_position"][0] for r in counts))
            if steps < self.config.draft_steps:
                continue
            rate = accepted / steps
            if before is not None and rate < (1.0 - self.config.acceptance_fall) * before[1]:
                self._acceptance_fell(before, pair, rate)
            before = pair, rate

    def _acceptance_fell(self, before: tuple[tuple[int, int], float], pair: tuple[int, int], rate: float) -> None:
        if pair in self._fallen:
            return
        self._fallen[pair] = None
        if len(self._fallen) > FALLS_KEPT:
            del self._fallen[next(iter(self._fallen))]
        (policy, drafter), of = pair, "drafter" if pair[1] != before[0][1] else "policy"
        message = (
            f"the acceptance rate of first drafts fell by {1.0 - rate / before[1]:.0%}, from {before[1]:.3f} with "
            f"policy version {before[0][0]} and drafter version {before[0][1]} to {rate:.3f} with policy version "
            f"{policy} and drafter version {drafter}; responses stay right but come slower. Train the drafter, or push "
            "one that fits the policy"
        )
        self._raise("acceptance_fell", "drafter" if of == "drafter" else "policy", policy, drafter, message)

    def _raise(self, kind: AlarmKind, of: WeightsOf, policy: int, drafter: int, message: str) -> None:
        alarm = SpeculationAlarm(kind=kind, of=of, policy_version=policy, drafter_version=drafter, message=message)
        self.raised = [*self.raised, alarm][-ALARMS_KEPT:]
        self.on_alarm(kind)
        logger.error("alarm, %s: %s", kind, message)
