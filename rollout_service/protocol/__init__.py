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
POST, GET /v1/fleet/engines           ScaleEngines -> FleetStatus
GET  /health, /ping, /ready, /metrics, /load, /version
GET  /v1/models, /v1/models/{model}, POST /v1/completions, /v1/chat/completions     vLLM's own types
POST /inference/v1/generate, /v1/completions/render, /v1/chat/completions/render, /tokenize, /detokenize   the same
RolloutRecord is part of answers of vLLM's types that were asked for it.
POST /pause, /resume, /update_weights, ...      vLLM's control routes, in protocol/control.py
"""

from rollout_service.bearer_token import WithToken
from rollout_service.certificates import WithAuthority
from rollout_service.protocol.batches import (
    Batch,
    BatchesStatus,
    FailedGroup,
    LeaseExtension,
    LeaseGroups,
    LeaseInfo,
    LeaseRequest,
    LeaseStatus,
    PromptsRequest,
    PromptsStatus,
)
from rollout_service.protocol.bounds import (
    LONGEST_RUN,
    LONGEST_SESSION,
    MAX_COMPLETIONS,
    MAX_GROUPS,
    MAX_INT32,
    MAX_TEMPERATURE,
    MAX_VERSION,
    MIN_TEMPERATURE,
    Endpoint,
    ResponseTokens,
    Temperature,
    TokenId,
    TopK,
    TopP,
    Version,
    WeightsOf,
    as_sampled,
    sampled_otherwise,
)
from rollout_service.protocol.control import (
    CONTROL_PATHS,
    AbortById,
    AbortedRequests,
    AbortRequests,
    Awake,
    CacheReset,
    CheckWeights,
    FinishUpdate,
    InitTransfer,
    IsPaused,
    IsSleeping,
    NewVersion,
    Paused,
    Relabelled,
    ServerInfo,
    Sleeping,
    Tags,
    UpdateMessage,
    UpdateWeights,
    WeightCheck,
    WeightInfo,
    WorldSize,
)
from rollout_service.protocol.fleet import FLEET_PATH, MAX_ENGINES, EngineState, EngineStatus, FleetStatus, ScaleEngines
from rollout_service.protocol.rollout_record import RECORD, RETURN_RECORD, RolloutRecord
from rollout_service.protocol.rollouts import (
    PROMPTS,
    Completion,
    Group,
    GroupRequest,
    Message,
    RolloutRequest,
    RoutedExperts,
    Sampling,
    Speculation,
    WeightSpan,
)
from rollout_service.protocol.speculation import (
    AcceptanceCounts,
    AgedAcceptance,
    AlarmKind,
    ContextAcceptance,
    DraftChoice,
    DrafterAcceptance,
    DraftSchedule,
    ScheduleSource,
    SpeculationAlarm,
    SpeculationStatus,
    VersionedAcceptance,
)
from rollout_service.protocol.weights import SharedMemoryPush, WeightsStatus, WeightStatus
from rollout_service.protocol.wire_type import INTERFACE_VERSION, VERSION_HEADER, ErrorBody, Problem, WireType

__all__ = [
    "CONTROL_PATHS", "FLEET_PATH", "INTERFACE_VERSION", "LONGEST_RUN", "LONGEST_SESSION", "MAX_COMPLETIONS",
    "MAX_ENGINES", "MAX_GROUPS", "MAX_INT32", "MAX_TEMPERATURE", "MAX_VERSION", "MIN_TEMPERATURE", "PROMPTS", "RECORD",
    "RETURN_RECORD", "VERSION_HEADER", "AbortById", "AbortRequests", "AbortedRequests", "AcceptanceCounts",
    "AgedAcceptance", "AlarmKind", "Awake", "Batch", "BatchesStatus", "CacheReset", "CheckWeights", "Completion",
    "ContextAcceptance", "DraftChoice", "DraftSchedule", "DrafterAcceptance", "Endpoint", "EngineState",
    "EngineStatus", "ErrorBody", "FailedGroup", "FinishUpdate", "FleetStatus", "Group", "GroupRequest", "InitTransfer",
    "IsPaused", "IsSleeping", "LeaseExtension", "LeaseGroups", "LeaseInfo", "LeaseRequest", "LeaseStatus", "Message",
    "NewVersion", "Paused", "Problem", "PromptsRequest", "PromptsStatus", "Relabelled", "ResponseTokens",
    "RolloutRecord", "RolloutRequest", "RoutedExperts", "Sampling", "ScaleEngines", "ScheduleSource", "ServerInfo",
    "SharedMemoryPush", "Sleeping", "Speculation", "SpeculationAlarm", "SpeculationStatus", "Tags", "Temperature",
    "TokenId", "TopK", "TopP", "UpdateMessage", "UpdateWeights", "Version", "VersionedAcceptance", "WeightCheck",
    "WeightInfo", "WeightSpan", "WeightStatus", "WeightsOf", "WeightsStatus", "WireType", "WithAuthority", "WithToken",
    "WorldSize", "as_sampled", "sampled_otherwise",
]  # fmt: skip
