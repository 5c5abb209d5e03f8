"""POST /v1/prompts and /v1/batches/...: groups that are generated in the background, leased and acknowledged."""

from typing import Any

from pydantic import Field

from rollout_service.protocol.bounds import LONGEST_RUN, MAX_GROUPS, Version
from rollout_service.protocol.rollouts import Group, GroupRequest
from rollout_service.protocol.wire_type import WireType


class PromptsRequest(WireType):
    """Groups to generate in the background. Each needs an id of the client's; one sent again changes nothing, and with
    another request is an error.

    Example: `{"run": "a1", "groups": [{"id": "train-17", "prompt": "2 + 2 =", "n": 8}], "max_staleness": 2}`
    """

    groups: list[GroupRequest] = Field(
        min_length=1, max_length=MAX_GROUPS, json_schema_extra={"items": {"allOf": [
            {"$ref": "#/components/schemas/GroupRequest"},
            {"required": ["id"], "properties": {"id": {"type": "string", "minLength": 1}}},
        ]}},
    )  # fmt: skip
    run: str = Field(default="", max_length=LONGEST_RUN)
    """name of the client's run: ids are its own, and its batches hold its groups alone"""
    priority: int = Field(default=0, ge=-(2**31), lt=2**31)
    """higher first; equal ones in the order of arrival"""
    max_staleness: Version | None = None
    """weight versions: a group that can no longer be handed out within this bound is generated again"""
    model: str | None = None
    """the served policy's name; checked when given"""


class PromptsStatus(WireType):
    accepted: int
    """new groups, now in the queue"""
    known: int
    """groups sent before, left as they are"""
    acknowledged: list[str] = Field(default_factory=list)
    """those of them that were acknowledged: they will not be handed out again. The service remembers the newest 100,000
    acknowledged ids, fewer on a small disk; an older one that is sent again is a new group"""


class LeaseRequest(WireType):
    groups: int = Field(default=1, ge=1, le=MAX_GROUPS)
    run: str = Field(default="", max_length=LONGEST_RUN)
    max_staleness: Version | None = None
    """weight versions from a group's oldest token to `version`; older groups are generated again"""
    version: Version | None = None
    """the policy that will be trained on the batch, where it is ahead of that in service"""
    wait: float = Field(default=0.0, ge=0.0, le=600.0, allow_inf_nan=False)
    """seconds to wait until there are as many"""
    seconds: float = Field(default=300.0, gt=0.0, le=86400.0, allow_inf_nan=False)
    """the lease; groups neither acknowledged nor extended by then are handed out again"""


class FailedGroup(WireType):
    """A group that the engine refused: it will not be generated again."""

    id: str
    error: str
    """why, in the engine's words"""
    metadata: dict[str, Any] = Field(default_factory=dict)


class Batch(WireType):
    """Finished groups under a lease."""

    lease: str | None
    """None when there is no group, finished or failed"""
    groups: list[Group]
    failed: list[FailedGroup] = Field(default_factory=list)
    """of the run, under the same lease; they do not count among those asked for"""
    version: int
    """that staleness was reckoned to"""
    short: str | None = None
    """why there are fewer groups than asked for"""


class LeaseGroups(WireType):
    groups: list[str] | None = None
    """ids; all of the lease when not given"""


class LeaseExtension(WireType):
    seconds: float = Field(default=300.0, gt=0.0, le=86400.0, allow_inf_nan=False)
    """from now"""


class LeaseStatus(WireType):
    lease: str
    groups: list[str]
    """that were acknowledged, returned or extended"""
    lost: list[str] = Field(default_factory=list)
    """that were asked for and are not under this lease (any more)"""


class LeaseInfo(WireType):
    lease: str
    groups: int
    seconds_left: float


class BatchesStatus(WireType):
    """Groups by where they are, and what was generated in vain."""

    waiting: int
    generating: int
    finished: int
    leased: int
    acknowledged: int
    """all that ever were"""
    capacity: int
    """groups that may be in the queue, acknowledged ones not counted"""
    oldest_seconds: float
    """since the oldest finished group was finished"""
    oldest_version: int | None
    """weight version of the oldest token of a finished group"""
    ages: list[float]
    """of finished groups, in seconds, oldest first"""
    leases: list[LeaseInfo]
    failed: int = 0
    """groups that an engine refused and that are not leased"""
    dropped: int
    """groups that became too stale, finished or not, and were generated again"""
    tokens_wasted: int
    """of dropped groups, and of those that a weight update aborted"""
    persistent: bool
    """whether the queue is on disk, and outlives the service"""
    engines_idle: list[float] = Field(default_factory=list)
    """seconds since the start that each engine had nothing to generate"""
