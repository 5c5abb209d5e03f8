"""Status of an engine's draft lengths, in words and figures, for GET /v1/speculation: what is drafted now, and why."""

from drafters.schedule import (
    HYSTERESIS,
    KEPT_GAIN,
    LEAST_GAIN,
    TOLERANCE,
    LiveSchedule,
    Range,
    speeds_by_length,
    threshold,
    to_drafts,
)
from rollout_service.protocol import DraftChoice, DraftSchedule, ScheduleSource

RULE = (
    f"The schedule picks the shortest draft whose predicted speed is within {100 * TOLERANCE:.0f} % of the fastest and "
    f"at least {1 + LEAST_GAIN:.2f} times that without drafts ({1 + KEPT_GAIN:.2f} times while drafts are in use). "
    f"It keeps the length in use if another gains less than {100 * HYSTERESIS:.0f} %."
)
AWAKE = "Without drafts the drafter still runs its first forward pass, and the speeds include that."


def given_status(
    engine: int, source: ScheduleSource, ranges: list[Range], running: int, *, configured: bool
) -> DraftSchedule:
    """The status of draft lengths that nothing changes: `configured`, or set while the engine runs."""
    return DraftSchedule(
        engine=engine,
        source=source,
        ranges=ranges,
        batch_size=running,
        draft_tokens=_length_at(ranges, running),
        reason="As configured in drafter.schedule." if configured else "As set while the engine runs.",
    )


def live_status(
    engine: int, source: ScheduleSource, ranges: list[Range], running: int, live: LiveSchedule, *, rests: bool = True
) -> DraftSchedule:
    """The status of draft lengths that follow acceptance. `rests`: whether the drafter does nothing at length zero."""
    acceptance = live.acceptance.by_position

    def choice(batch: int) -> DraftChoice:
        speeds, length = speeds_by_length(live.costs, acceptance, batch), _length_at(ranges, batch)
        return DraftChoice(
            batch_size=batch, draft_tokens=length, tokens_per_second=speeds, threshold=threshold(speeds[0], length)
        )

    sizes = sorted({*live.costs.batch_sizes, *([running] if running else [])})
    origin = "measured when the engine started" if source == "auto" else "of the calibration"
    rates = " ".join(f"{a:.2f}" for a in acceptance)
    return DraftSchedule(
        engine=engine,
        source=source,
        ranges=ranges,
        batch_size=running,
        draft_tokens=_length_at(ranges, running),
        choices=[choice(batch) for batch in sizes],
        acceptance_by_position=acceptance,
        changes=live.changes,
        reason=(
            f"{_now(choice(running)) if running else 'Nothing runs at present.'} {RULE} Speeds are predicted from step "
            f"costs {origin}, and from acceptance by position, {rates}, after {live.acceptance.drafts} drafts of this "
            f"drafter.{'' if rests else ' ' + AWAKE}"
        ),
    )


def _length_at(ranges: list[Range], batch: int) -> int:
    return to_drafts(ranges, batch)[-1] if batch else 0


def _now(choice: DraftChoice) -> str:
    """What the present batch size drafts, in one sentence."""
    without, *drafting = choice.tokens_per_second
    if choice.draft_tokens:
        gain = drafting[choice.draft_tokens - 1] / without
        return (
            f"At the present batch size, {choice.batch_size}, the draft length is {choice.draft_tokens}, "
            f"{gain:.2f} times as fast as without drafts."
        )
    best = max(drafting)
    return (
        f"At the present batch size, {choice.batch_size}, nothing is drafted: the fastest draft length, "
        f"{drafting.index(best) + 1}, is {best / without:.2f} times as fast as without drafts, and the threshold is "
        f"{choice.threshold / without:.2f} times."
    )
