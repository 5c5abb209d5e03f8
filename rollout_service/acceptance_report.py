"""GET /v1/speculation: the engines' counts, summed over engines, and the ratios over them."""

from typing import Any

from drafters.drafter import DrafterConfig
from rollout_service.protocol import AcceptanceCounts, DrafterAcceptance, SpeculationStatus, VersionedAcceptance


def speculation_status(drafter: DrafterConfig, rows: list[dict[str, Any]]) -> SpeculationStatus:
    """`rows`: one an engine and pair of versions, as `Engine.speculation` gives them."""
    if drafter.kind == "none":
        return SpeculationStatus(drafters=[])
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
                **_summed(rows).model_dump(),
            )
        ]
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
