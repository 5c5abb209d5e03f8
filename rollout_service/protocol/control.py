"""Control routes: what vLLM's reinforcement-learning clients send and read, under vLLM's own names.

As in vLLM, a route that reads no body ignores any: trainers send `{}`, `{"is_checkpoint_format": true}` or nothing.
A body needs no content type. Where a body is read, a field that neither vLLM nor this service has is an error.
"""

from typing import Any, Literal

from pydantic import Field

from rollout_service.protocol.fleet import FLEET_PATH
from rollout_service.protocol.wire_type import WireType

CONTROL_PATHS = (
    "/pause", "/resume", "/is_paused", "/abort_requests", "/inference/v1/abort_requests", "/reset_prefix_cache",
    "/sleep", "/wake_up", "/is_sleeping",
    "/init_weight_transfer_engine", "/shutdown_weight_transfer_engine", "/start_weight_update",
    "/start_draft_weight_update", "/update_weights", "/finish_weight_update", "/update_weight_version", "/weight_info",
    "/weight_checker",
    "/get_world_size", "/server_info", "/collective_rpc", FLEET_PATH,
)  # fmt: skip
"""every control route; whoever may call them decides what the service generates, and with which weights"""
Tags = Literal["weights", "kv_cache", "scheduling"]
"""what a sleep frees and a wake-up takes back, by vLLM's names; `scheduling` frees nothing"""


class Paused(WireType):
    status: Literal["paused", "resumed"]


class IsPaused(WireType):
    is_paused: bool


class AbortRequests(WireType):
    request_ids: list[str] | None = None
    """ids of requests to vLLM's own routes; all requests if there are none"""


class AbortById(WireType):
    request_ids: list[str]


class AbortedRequests(WireType):
    status: Literal["aborted"] = "aborted"
    aborted: int
    """requests, of which a group of n completions counts as n + 1, as vLLM counts them"""


class CacheReset(WireType):
    success: bool
    """whether every engine's cache is empty now; false while completions hold some of it"""


class Sleeping(WireType):
    status: Literal["sleeping"] = "sleeping"
    level: int
    memory: Literal["freed", "kept"]
    """kept: the engines only pause, because they are on a CPU, the level is 0, or vLLM's sleep mode is not on
    (`engine.vllm.enable_sleep_mode`)"""


class Awake(WireType):
    status: Literal["awake", "sleeping"]
    """sleeping while some memory is still freed"""
    tags: list[Tags] | None


class IsSleeping(WireType):
    is_sleeping: bool
    """also true in a pause, as in vLLM"""


class InitTransfer(WireType):
    init_info: dict[str, Any]
    """vLLM's: `master_address`, `master_port`, `rank_offset`, `world_size` and `packed` for NCCL; `packed` alone for
    CUDA IPC"""


class UpdateWeights(WireType):
    """Exactly one of both fields."""

    update_info: dict[str, Any] | list[dict[str, Any]] | None = None
    """in a session: `{"weight_dir": folder}`, `{"file": name}` in the service's shared-memory folder, or what vLLM's
    transfer takes; a list has one entry, since the service is one receiver"""
    weight_dir: str | None = None
    """without a session: a folder on the service's machine with the policy's safetensors files, loaded at once"""


class FinishUpdate(WireType):
    weight_version: str | None = None
    """a whole number above the version in service, such as "13"; without it the next number"""


class UpdateMessage(WireType):
    """vLLM's answer, and what this service adds to it."""

    message: str
    weight_version: str | None = None
    """the version that every engine holds now; null while nothing has changed yet"""
    ignored: list[str] = Field(default_factory=list)
    """tensors that were left out: those of the other weight set, and a head that is tied to the embedding"""


class NewVersion(WireType):
    new_version: str
    """a whole number above the version in service"""


class Relabelled(WireType):
    success: bool = True
    new_version: str


class WeightInfo(WireType):
    weight_version: str


class CheckWeights(WireType):
    action: Literal["checksum", "compare", "reset"]
    """reset is refused: it would put zeros into service"""
    baseline: dict[str, str] | None = None
    """the checksums to compare with"""


class WeightCheck(WireType):
    """`checksums` for the action checksum; `match` and `mismatches` for compare."""

    checksums: dict[str, str] | None = None
    """by rank and name; layers that are packed inside a CPU's kernel have an entry that ends with `.packed`"""
    match: bool | None = None
    mismatches: list[str] | None = None


class WorldSize(WireType):
    world_size: int
    """always 1: a trainer's transfer has one receiver, which gives the weights to all engines"""


class ServerInfo(WireType):
    vllm_config: dict[str, Any] | str
    """of an engine, as vLLM gives it; `weight_transfer_config` says what this service offers"""
    vllm_env: dict[str, Any]
    system_env: dict[str, Any]
