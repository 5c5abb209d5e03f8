"""GET /v1/speculation: acceptance, the schedules of draft lengths, and alarms."""

from typing import Literal

from pydantic import Field

from rollout_service.protocol.bounds import WeightsOf
from rollout_service.protocol.wire_type import WireType


class AcceptanceCounts(WireType):
    """Sums since the start, and the ratios vLLM defines over them."""

    draft_steps: int
    drafted: int
    accepted: int
    accepted_by_position: list[int]
    acceptance_length: float
    """accepted / draft_steps + 1"""
    acceptance_rate: float
    """accepted / drafted"""
    acceptance_by_position: list[float]
    """accepted at position i / draft_steps"""


class VersionedAcceptance(AcceptanceCounts):
    policy_version: int
    drafter_version: int


class AgedAcceptance(AcceptanceCounts):
    drafter_age: int
    """policy versions since the drafter's last update"""


class ContextAcceptance(WireType):
    """Draft steps that began with `from_tokens` tokens of context or more, and fewer than twice as many. Finished
    completions of POST /v1/rollouts only."""

    from_tokens: int
    draft_steps: int
    accepted: int
    acceptance_length: float
    acceptance_by_position: list[float]


class DrafterAcceptance(AcceptanceCounts):
    drafter: str
    draft_tokens: int
    draft_sampling: str
    verification: str
    by_version: list[VersionedAcceptance]
    """of the newest versions; the totals are of all"""
    by_age: list[AgedAcceptance] = Field(default_factory=list)
    """of the same versions, where it is known when their drafter came"""
    by_context_length: list[ContextAcceptance] = Field(default_factory=list)


ScheduleSource = Literal["auto", "file", "ranges", "fixed"]


class DraftChoice(WireType):
    """The draft length at one batch size, and the predicted speeds that it was chosen by."""

    batch_size: int
    draft_tokens: int
    """in use; 0 drafts nothing"""
    tokens_per_second: list[float]
    """predicted for all completions together, by draft length from 0; without their prompts"""
    threshold: float
    """tokens per second that a draft length must reach to be drafted"""


class DraftSchedule(WireType):
    """How many tokens one engine drafts at each batch size, and why."""

    engine: int
    source: ScheduleSource
    """auto: costs measured at the start; file: of a calibration; both follow acceptance. ranges and fixed: as given"""
    ranges: list[tuple[int, int, int]]
    """smallest batch size, largest, draft tokens; 0 drafts nothing"""
    batch_size: int = 0
    """completions that run now"""
    draft_tokens: int = 0
    """drafted at that batch size"""
    choices: list[DraftChoice] = Field(default_factory=list)
    """of the measured batch sizes and of the present one; empty where nothing is chosen"""
    acceptance_by_position: list[float] = Field(default_factory=list)
    """the estimate that the choice is based on: lately observed, and what was known before"""
    changes: int = 0
    """of the schedule since the start"""
    reason: str
    """what is drafted now, and by which rule"""


AlarmKind = Literal["not_changed", "checksum", "acceptance_fell"]


class SpeculationAlarm(WireType):
    """Speculation that has become slow without being wrong. Raised once for a pair of versions."""

    kind: AlarmKind
    """not_changed: a push left what was there; checksum: an engine read other bytes than were sent; acceptance_fell:
    after a push, the acceptance rate is below the one before by more than the set fraction"""
    of: WeightsOf
    """the weights whose push it is about"""
    policy_version: int
    drafter_version: int
    message: str


class SpeculationStatus(WireType):
    drafters: list[DrafterAcceptance]
    """empty when no drafter is on"""
    schedules: list[DraftSchedule] = Field(default_factory=list)
    """one an engine in service"""
    alarms: list[SpeculationAlarm] = Field(default_factory=list)
    """the newest, earliest first"""
