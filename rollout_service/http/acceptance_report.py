"""GET /v1/speculation: the engines' counts, summed over engines, and the ratios of these sums."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from drafters.acceptance import Acceptance, total
from drafters.registry import DrafterConfig
from rollout_service.protocol import (
    AcceptanceCounts,
    AgedAcceptance,
    ContextAcceptance,
    DrafterAcceptance,
    DraftSchedule,
    SpeculationAlarm,
    SpeculationStatus,
    VersionedAcceptance,
)


def speculation_status(
    drafter: DrafterConfig,
    rows: list[dict[str, Any]],
    drafter_since: Mapping[int, int],
    contexts: list[dict[int, list[int]]],
    alarms: list[SpeculationAlarm],
    schedules: list[DraftSchedule],
    running: Mapping[str, str],
) -> SpeculationStatus:
    """`rows`: one for each engine and pair of versions, and one for each engine's older pairs, as `Engine.speculation`
    returns them. `drafter_since`: the policy version in service when each drafter version came. `contexts`: one for
    each engine, as `Engine.context_acceptance` returns them. `running`: as `Engine.running` returns it. The totals are
    of all rows. The counts by version and by age leave out the older pairs, whose versions are not known."""
    if not drafter.drafts:
        return SpeculationStatus(drafters=[], alarms=alarms)
    pairs: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    ages: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        policy, draft = row["policy_version"], row["drafter_version"]
        if policy is None:
            continue
        pairs[policy, draft].append(row)
        if draft in drafter_since:
            ages[policy - drafter_since[draft]].append(row)
    by_age = [AgedAcceptance(drafter_age=age, **_summed(ages[age]).model_dump()) for age in sorted(ages)]
    by_context = [
        _of_context(floor, total(Acceptance(0, of_engine[floor]) for of_engine in contexts if floor in of_engine))
        for floor in sorted({floor for of_engine in contexts for floor in of_engine})
    ]
    by_version = [
        VersionedAcceptance(policy_version=pair[0], drafter_version=pair[1], **_summed(pairs[pair]).model_dump())
        for pair in sorted(pairs)
    ]
    return SpeculationStatus(
        drafters=[
            DrafterAcceptance(
                drafter=drafter.kind,
                draft_tokens=drafter.draft_tokens,
                draft_sampling=running.get("draft_sampling", drafter.draft_sampling),
                verification=running.get("verification", drafter.verification),
                by_version=by_version,
                by_age=by_age,
                by_context_length=by_context,
                **_summed(rows).model_dump(),
            )
        ],
        schedules=schedules,
        alarms=alarms,
    )


def _of_context(floor: int, acceptance: Acceptance) -> ContextAcceptance:
    return ContextAcceptance(
        from_tokens=floor,
        draft_steps=acceptance.steps,
        accepted=acceptance.accepted,
        acceptance_length=acceptance.length,
        acceptance_by_position=acceptance.by_position,
    )


def _summed(rows: list[dict[str, Any]]) -> AcceptanceCounts:
    steps, drafted, accepted = (sum(row[key] for row in rows) for key in ("draft_steps", "drafted", "accepted"))
    by_position = [sum(at) for at in zip(*(row["accepted_by_position"] for row in rows), strict=True)]
    return AcceptanceCounts(
        draft_steps=steps,
        drafted=drafted,
        accepted=accepted,
        accepted_by_position=by_position,
        acceptance_length=1 + accepted / steps if steps else 1.0,
        acceptance_rate=accepted / drafted if drafted else 0.0,
        acceptance_by_position=[at / steps for at in by_position] if steps else [],
    )
