"""GET /v1/speculation: acceptance, the schedules of draft lengths, and alarms."""

from typing import Literal

from pydantic import Field

from rollout_service.protocol.bounds import WeightsOf
from rollout_service.protocol.wire_type import WireType


class AcceptanceCounts(WireType):
    """Sums since the start, and ratios of them as vLLM defines them."""

    draft_steps: int
    """steps that had drafts, counted for each completion"""
    drafted: int
    """tokens that were drafted in these steps"""
    accepted: int
    """drafted tokens that were accepted"""
    accepted_by_position: list[int]
    """steps that accepted the draft at each position"""
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
    """Draft steps that began with at least `from_tokens` tokens of context, and with fewer than twice as many. Finished
    completions are counted, whatever their route."""

    from_tokens: int
    draft_steps: int
    accepted: int
    acceptance_length: float
    acceptance_by_position: list[float]


class DrafterAcceptance(AcceptanceCounts):
    drafter: str
    draft_tokens: int
    draft_sampling: str
    """probabilistic or greedy, as the engines do now"""
    verification: str
    """standard or block, and whose function it is; as configured while no engine is in service"""
    by_version: list[VersionedAcceptance]
    """counts of the newest pairs of versions; the totals above are of all versions"""
    by_age: list[AgedAcceptance] = Field(default_factory=list)
    """counts of the same versions by the drafter's age, if it is known when the drafter came"""
    by_context_length: list[ContextAcceptance] = Field(default_factory=list)


ScheduleSource = Literal["auto", "file", "ranges", "fixed"]


class DraftChoice(WireType):
    """The draft length at one batch size, and the predicted speeds that decided it."""

    batch_size: int
    draft_tokens: int
    """draft length in use; 0 drafts nothing"""
    tokens_per_second: list[float]
    """predicted speed of all completions together, for each draft length from 0, prompts not included"""
    threshold: float
    """tokens per second that a draft length must reach to be used"""


class DraftSchedule(WireType):
    """How many tokens one engine drafts at each batch size, and why."""

    engine: int
    source: ScheduleSource
    """auto: chosen from step costs measured at the start; file: from a calibration file; both follow acceptance.
    ranges, fixed: the draft lengths that were given"""
    ranges: list[tuple[int, int, int]]
    """(smallest batch size, largest batch size, draft tokens); 0 draft tokens drafts nothing"""
    batch_size: int = 0
    """completions that run now"""
    draft_tokens: int = 0
    """draft length at that batch size"""
    choices: list[DraftChoice] = Field(default_factory=list)
    """one for each measured batch size and for the present one; empty if the draft lengths were given"""
    acceptance_by_position: list[float] = Field(default_factory=list)
    """the estimate that the choice is based on: recent observations, and what was known before"""
    changes: int = 0
    """how often the schedule has changed since the start"""
    reason: str
    """what is drafted now, and the rule that decides it"""


AlarmKind = Literal["not_changed", "checksum", "acceptance_fell"]


class SpeculationAlarm(WireType):
    """Speculation became slower, while samples stay right. An alarm is raised once for each pair of versions."""

    kind: AlarmKind
    """not_changed: a push changed nothing; checksum: an engine read other bytes than were sent; acceptance_fell: after
    a push, the acceptance rate is lower than before by more than the fraction alarms.acceptance_fall"""
    of: WeightsOf
    """the weights whose push caused the alarm"""
    policy_version: int
    drafter_version: int
    message: str


class SpeculationStatus(WireType):
    drafters: list[DrafterAcceptance]
    """empty when no drafter is on"""
    schedules: list[DraftSchedule] = Field(default_factory=list)
    """one for each engine in service"""
    alarms: list[SpeculationAlarm] = Field(default_factory=list)
    """the newest alarms, in the order in which they were raised"""
