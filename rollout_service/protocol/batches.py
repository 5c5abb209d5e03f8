"""POST /v1/prompts and /v1/batches/...: groups that are generated in the background, leased and acknowledged."""

from typing import Any

from pydantic import Field

from rollout_service.protocol.bounds import LONGEST_RUN, MAX_GROUPS, Version
from rollout_service.protocol.rollouts import Group, GroupRequest
from rollout_service.protocol.wire_type import WireType


class PromptsRequest(WireType):
    """Groups to generate in the background. Each needs an id that the client chooses. Sending a group again changes
    nothing. Sending another request under the same id is an error.

    Example: `{"run": "a1", "groups": [{"id": "train-17", "prompt": "2 + 2 =", "n": 8}], "max_staleness": 2}`
    """

    groups: list[GroupRequest] = Field(
        min_length=1, max_length=MAX_GROUPS, json_schema_extra={"items": {"allOf": [
            {"$ref": "#/components/schemas/GroupRequest"},
            {"required": ["id"], "properties": {"id": {"type": "string", "minLength": 1}}},
        ]}},
    )  # fmt: skip
    run: str = Field(default="", max_length=LONGEST_RUN)
    """name of the client's run: ids belong to a run, and a lease hands out groups of one run only"""
    priority: int = Field(default=0, ge=-(2**31), lt=2**31)
    """groups of a higher priority come first, equal ones in the order of arrival"""
    max_staleness: Version | None = None
    """in weight versions: a group that can no longer be handed out within this bound is generated again"""
    model: str | None = None
    """the served policy's name; when given, any other name is refused"""


class PromptsStatus(WireType):
    accepted: int
    """new groups, which are now in the queue"""
    known: int
    """groups that were sent before, which stay as they are"""
    acknowledged: list[str] = Field(default_factory=list)
    """ids of the known groups that were acknowledged: they will not be handed out again. The service remembers the
    newest 100,000 acknowledged ids, or fewer with a small disk quota. An older id that is sent again is a new group"""


class LeaseRequest(WireType):
    groups: int = Field(default=1, ge=1, le=MAX_GROUPS)
    """most finished groups to hand out"""
    run: str = Field(default="", max_length=LONGEST_RUN)
    """the run whose groups to hand out"""
    max_staleness: Version | None = None
    """most weight versions between a group's oldest token and `version`; older groups are generated again"""
    version: Version | None = None
    """version of the policy that will be trained on the batch, if it is ahead of the version in service"""
    wait: float = Field(default=0.0, ge=0.0, le=600.0, allow_inf_nan=False)
    """most seconds to wait until that many groups are finished"""
    seconds: float = Field(default=300.0, gt=0.0, le=86400.0, allow_inf_nan=False)
    """length of the lease; groups that are neither acknowledged nor extended by its end are handed out again"""


class FailedGroup(WireType):
    """A group that could not be generated. It is not tried again."""

    id: str
    error: str
    """the reason"""
    metadata: dict[str, Any] = Field(default_factory=dict)
    """that of the request"""


class Batch(WireType):
    """Finished groups under a lease."""

    lease: str | None
    """None when there is neither a finished nor a failed group"""
    groups: list[Group]
    failed: list[FailedGroup] = Field(default_factory=list)
    """failed groups of the run, under the same lease; they do not count among the groups asked for"""
    version: int
    """the policy version that staleness was measured against"""
    short: str | None = None
    """why there are fewer groups than asked for"""


class LeaseGroups(WireType):
    groups: list[str] | None = None
    """ids of the groups; when not given, all groups of the lease"""


class LeaseExtension(WireType):
    seconds: float = Field(default=300.0, gt=0.0, le=86400.0, allow_inf_nan=False)
    """the lease ends this many seconds from now"""


class LeaseStatus(WireType):
    lease: str
    groups: list[str]
    """ids that were acknowledged, returned or extended"""
    lost: list[str] = Field(default_factory=list)
    """ids that were asked for but are not under this lease, or no longer"""


class LeaseInfo(WireType):
    """A lease that has not ended."""

    lease: str
    groups: int
    """number of groups under it"""
    seconds_left: float


class BatchesStatus(WireType):
    """How many groups are in which state, and what was generated in vain."""

    waiting: int
    """groups that wait to be generated"""
    generating: int
    """groups that engines are generating"""
    finished: int
    """finished groups that are not leased"""
    leased: int
    """groups under a lease, failed ones included"""
    acknowledged: int
    """all groups that were ever acknowledged"""
    capacity: int
    """most groups that may be in the queue; acknowledged groups do not count"""
    oldest_seconds: float
    """seconds since the oldest finished group was finished"""
    oldest_version: int | None
    """lowest weight version among the tokens of finished groups"""
    ages: list[float]
    """seconds since each finished group was finished, oldest first"""
    leases: list[LeaseInfo]
    failed: int = 0
    """failed groups that are not leased"""
    dropped: int
    """groups, finished or not, that became too stale and were generated again"""
    tokens_wasted: int
    """tokens of dropped groups, and of groups that a cancellation or a weight update aborted"""
    persistent: bool
    """whether the queue is on disk and outlives the service"""
    engines_idle: list[float] = Field(default_factory=list)
    """for each engine by index, the seconds since its start in which it had nothing to generate"""
