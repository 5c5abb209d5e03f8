"""GET /v1/speculation: the engines' counts, summed over engines, and the ratios over them."""

from collections.abc import Mapping
from typing import Any

from drafters.acceptance import Acceptance, total
from drafters.drafter import DrafterConfig
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
) -> SpeculationStatus:
    """`rows`: one an engine and pair of versions, as `Engine.speculation` gives them; `drafter_since`: the policy
    version that each drafter version came to; `contexts`: one an engine, as `Engine.context_acceptance` gives them."""
    if drafter.kind == "none":
        return SpeculationStatus(drafters=[], alarms=alarms)
    ages = [row["policy_version"] - drafter_since.get(row["drafter_version"], 0) for row in rows]
    by_age = [
        AgedAcceptance(
            drafter_age=age, **_summed([r for r, its in zip(rows, ages, strict=True) if its == age]).model_dump()
        )
        for age in sorted(set(ages))
    ]
    by_context = [
        _of_context(floor, total(Acceptance(0, of_engine[floor]) for of_engine in contexts if floor in of_engine))
        for floor in sorted({floor for of_engine in contexts for floor in of_engine})
    ]
    pairs = sorted({(row["policy_version"], row["drafter_version"]) for row in rows})
    by_version = [
        VersionedAcceptance(
            policy_version=policy,
            drafter_version=draft,
            **_summed([r for r in rows if (r["policy_version"], r["drafter_version"]) == (policy, draft)]).model_dump(),
        )
        for policy, draft in pairs
    ]
    return SpeculationStatus(
        drafters=[
            DrafterAcceptance(
                drafter=drafter.kind,
                draft_tokens=drafter.draft_tokens,
                draft_sampling=drafter.draft_sampling,
                verification=drafter.verification,
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
