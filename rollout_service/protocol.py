"""Every wire type of the service: the one description of the HTTP interface.

POST /v1/rollouts                     RolloutRequest -> one Group a line (application/x-ndjson)
POST /v1/weights/{policy|drafter}     safetensors stream, or SharedMemoryPush -> WeightStatus
GET  /v1/weights                      WeightsStatus; DELETE /v1/weights?run=NAME
POST /v1/prompts                      PromptsRequest -> PromptsStatus; DELETE /v1/prompts?run=NAME
POST /v1/batches/lease                LeaseRequest -> Batch
POST /v1/batches/{lease}/ack, /nack   LeaseGroups -> LeaseStatus
POST /v1/batches/{lease}/extend       LeaseExtension -> LeaseStatus
GET  /v1/batches                      BatchesStatus; DELETE /v1/batches?run=NAME
GET  /v1/speculation                  SpeculationStatus
GET  /health, /ready, /metrics
GET  /v1/models, POST /v1/completions, POST /v1/chat/completions     vLLM's own types
"""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from rollout_service.bearer_token import WithToken as WithToken  # what a client needs besides the types
from rollout_service.endpoint import checked_endpoint
from rollout_service.lossless import not_lossless

INTERFACE_VERSION = 1
"""raised by a change that clients of the earlier number cannot live with, such as a new value where an answer's type
lists them all; a new field of an answer is no such change"""
VERSION_HEADER = "x-rollout-client"
"""of a request: the client's INTERFACE_VERSION; a client that does not say is served"""

MAX_GROUPS = 4096
MAX_COMPLETIONS = 512
MIN_TEMPERATURE = 0.01
"""vLLM raises what lies between 0 and this to this, and what was sampled would not be what was asked for"""
MAX_TEMPERATURE = 2.0
"""vLLM's own bound"""
MAX_INT32 = 2**31 - 1
"""what the engine's integers hold"""
LONGEST_RUN = 256
"""characters of a run's name"""
MAX_VERSION = 2**53 - 1
"""what every reader of JSON holds exactly; the queue's database holds more, sums of two included"""

Endpoint = Annotated[str, AfterValidator(checked_endpoint)]
"""URL of a service, e.g. http://127.0.0.1:8000 or http://[::1]:8000"""
WeightsOf = Literal["policy", "drafter"]
Version = Annotated[int, Field(ge=0, le=MAX_VERSION)]
"""a weight version, or a number of them"""
TokenId = Annotated[int, Field(ge=0, le=MAX_INT32)]


def sampled_otherwise(temperature: float) -> str | None:
    """What is wrong with a temperature that vLLM would raise; None for all others."""
    if 0.0 < temperature < MIN_TEMPERATURE:
        return f"{temperature:g} is sampled as {MIN_TEMPERATURE}: give that, or 0 for the best token"
    return None


def as_sampled(temperature: float) -> float:
    if message := sampled_otherwise(temperature):
        raise ValueError(message)
    return temperature


Temperature = Annotated[
    float,
    Field(
        ge=0.0, le=MAX_TEMPERATURE, allow_inf_nan=False,
        json_schema_extra={"anyOf": [{"const": 0.0}, {"minimum": MIN_TEMPERATURE}]},
    ),
    AfterValidator(as_sampled),
]  # fmt: skip
TopP = Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)]
TopK = Annotated[int, Field(ge=0, le=MAX_INT32)]
ResponseTokens = Annotated[int, Field(ge=1, le=MAX_INT32)]
"""what the engine takes, in requests and in the configurations that requests are made of"""


class WireType(BaseModel):
    """In a request unknown fields are errors: a misspelt sampling parameter must not be ignored. The client reads
    answers with extra="ignore": the service may be newer."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Sampling(WireType):
    """How tokens are drawn. Only what speculation keeps lossless can be asked for."""

    temperature: Temperature = 1.0
    """0 takes the most likely token; else 0.01 or more, as the engine has it"""
    top_p: TopP = 1.0
    """smallest set of tokens whose probabilities reach this"""
    top_k: TopK = 0
    """the k most likely tokens; 0 for all"""
    max_tokens: ResponseTokens = 256
    """longest response, in tokens"""
    min_tokens: int = Field(default=0, ge=0, le=MAX_INT32)
    """no end of sequence before this many tokens"""
    stop: list[Annotated[str, StringConstraints(min_length=1)]] = Field(default_factory=list, max_length=16)
    """strings that end a response"""
    ignore_eos: bool = False
    """go on to max_tokens past the end of sequence (fixed lengths)"""
    seed: int | None = Field(default=None, ge=0, lt=2**31)
    """completion i of a group draws with seed + i; the sample path also depends on the drafter"""

    @model_validator(mode="before")
    @classmethod
    def lossless(cls, data: Any) -> Any:
        for name, message in not_lossless(data, "rollouts") if isinstance(data, dict) else ():
            raise ValueError(f"{name} {message}")
        return data


class Message(WireType):
    role: str
    content: str


PROMPTS = "prompt", "prompt_token_ids", "messages"
"""fields of a group, of which exactly one is given"""


class GroupRequest(WireType):
    """One prompt, as text, token ids or chat messages, and how many completions of it.

    Example: `{"prompt": "2 + 2 =", "n": 8, "sampling": {"temperature": 1.0, "max_tokens": 64}}`
    """

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [{"required": [name], "properties": {name: {"not": {"type": "null"}}}} for name in PROMPTS]
        }
    )

    id: str | None = Field(default=None, max_length=256)
    """the client's own name for the group; comes back with it. Without one it is the group's index in the request, with
    underscores behind it where another group has that name"""
    prompt: str | None = None
    prompt_token_ids: list[TokenId] | None = Field(default=None, min_length=1)
    messages: list[Message] | None = Field(default=None, min_length=1)
    n: int = Field(default=1, ge=1, le=MAX_COMPLETIONS)
    """completions"""
    sampling: Sampling = Field(default_factory=Sampling)
    draft_steps: bool = False
    """let each completion's speculation record hold every step (`steps`)"""
    metadata: dict[str, Any] = Field(default_factory=dict)
    """comes back with the group, untouched"""

    @model_validator(mode="after")
    def one_prompt(self) -> "GroupRequest":
        if sum(getattr(self, name) is not None for name in PROMPTS) != 1:
            raise ValueError(f"give exactly one of {', '.join(PROMPTS)}")
        return self

    @model_validator(mode="after")
    def one_greedy_completion(self) -> "GroupRequest":
        if self.sampling.temperature == 0.0 and self.n > 1:
            raise ValueError(f"n is {self.n} at temperature 0, where all completions are the same: give n = 1")
        return self

    @field_validator("metadata")
    @classmethod
    def comes_back(cls, metadata: dict[str, Any]) -> dict[str, Any]:
        """What JSON cannot hold would come back as another value: an infinity that 1e400 became, a lone surrogate."""
        try:
            json.dumps(metadata, ensure_ascii=False, allow_nan=False).encode()
        except ValueError as error:
            raise ValueError(f"cannot be written as JSON again: {error}") from None
        return metadata


class RolloutRequest(WireType):
    groups: list[GroupRequest] = Field(min_length=1, max_length=MAX_GROUPS)
    model: str | None = None
    """the served policy's name; checked when given"""


class WeightSpan(WireType):
    """Tokens [start, end) of a completion were sampled by policy version `version`."""

    version: int
    start: int
    end: int


class Speculation(WireType):
    """One completion's speculation record. Ratios are of sums over many of these, never means of ratios.

    Example: 10 steps of 3 drafts, 4 of which accepted none, 6 all:
    `{"draft_steps": 10, "drafted": 30, "accepted": 18, "accepted_histogram": [4, 0, 0, 6], ...}`
    """

    drafter: str
    drafter_version: int
    draft_steps: int
    drafted: int
    accepted: int
    accepted_histogram: list[int]
    """steps by the number of accepted drafts, 0 to k"""
    steps: list[tuple[int, int]] | None = None
    """(drafted, accepted) of every step in order, those without drafts as (0, 0), when asked for: a step yields its
    accepted drafts and one more token, the last one may be cut by the response's end"""


class Completion(WireType):
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[float]
    """of each token under the distribution it was drawn from (after temperature, top-k, top-p), in nats; at temperature
    0, where that is certain, under the one of temperature 1"""
    weight_versions: list[WeightSpan]
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None = None
    """the stop string or token that ended the response; None for the end of sequence"""
    speculation: Speculation | None = None
    """None when no drafter is on"""


class Group(WireType):
    """A finished group: one line of the answer of POST /v1/rollouts."""

    id: str
    prompt_token_ids: list[int]
    completions: list[Completion]
    sampling: Sampling
    """what it was drawn with: the request's, and the service's own defaults for what that left out"""
    engine: int
    """index of the engine that generated it"""
    metadata: dict[str, Any] = Field(default_factory=dict)


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


class Problem(WireType):
    """What was wrong with a request: the field (`groups.3.sampling.top_p`), and what to do."""

    field: str
    message: str


class ErrorBody(WireType):
    """Body of every 4xx and 5xx answer but the OpenAI routes'; also a line of a rollout stream: in a group's place, or
    the last one of a stream that could not be finished."""

    error: str
    problems: list[Problem] = Field(default_factory=list)
    group: str | None = None
    """in a rollout stream: the id of the one group that failed; the others are delivered"""


class WeightStatus(WireType):
    """One set of weights as every engine holds it."""

    version: int
    """0 for the checkpoint the service started with; only grows"""
    tensors: int
    bytes: int
    checksum: str
    """BLAKE3 of the pushed safetensors bytes; empty for version 0"""
    seconds: float = 0.0
    """from the received bytes to the version's publication"""
    pause: float = 0.0
    """of these, the longest time that an engine did not generate"""
    run: str | None = None
    """the run that the weights belong to: no other replaces them unless it takes over; None when they are nobody's"""
    skipped: bool = False
    """answer to a push alone: a newer version came before this one was loaded; the status is of what is in service"""


class WeightsStatus(WireType):
    policy: WeightStatus
    drafter: WeightStatus | None
    """None when the drafter has no tensors of its own"""
    dtype: str
    """the floating-point dtype that pushed tensors must have, e.g. float32"""
    shared_memory: str
    """folder for pushes from the same machine; holds a file `token` that a local client must read"""


class SharedMemoryPush(WireType):
    """A push by reference: `file` lies in the service's shared-memory folder."""

    file: str = Field(pattern=r"^[A-Za-z0-9_-]+\.safetensors$")


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
    """the estimate that the choice rests on: lately observed, and what was known before"""
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
