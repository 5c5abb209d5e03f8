"""Calls of the service, each described once, as data. Each becomes a method of both clients, with its docstring.

| call                                | waits for an answer, in seconds                                           |
|-------------------------------------|---------------------------------------------------------------------------|
| all others                          | the client's `read_timeout`                                               |
| model                               | `within`, where it is given                                               |
| lease                               | the request's `wait`, and `read_timeout`                                  |
| extend                              | a quarter of the lease, so that another try comes before the lease's end  |
| scale                               | SCALE_TIMEOUT and `drain`: engines start or end before the answer         |
| push                                | PUSH_TIMEOUT: every engine loads the version before the answer            |
| rollouts, between two parts of it   | STREAM_SILENCE: nothing comes while the first group is generated          |
"""

from functools import partial
from typing import Any, Literal, TypeVar

from pydantic import BaseModel

from rollout_service.client.answers import check, read, served_model
from rollout_service.client.connection import Call, Connection
from rollout_service.protocol import (
    FLEET_PATH,
    Batch,
    BatchesStatus,
    FleetStatus,
    GroupRequest,
    LeaseExtension,
    LeaseGroups,
    LeaseRequest,
    LeaseStatus,
    PromptsRequest,
    PromptsStatus,
    RolloutRequest,
    ScaleEngines,
    SpeculationStatus,
    WeightsOf,
    WeightsStatus,
    WeightStatus,
)
from rollout_service.transports import Sent

M = TypeVar("M", bound=BaseModel)

PUSH_TIMEOUT = 1800.0
"""seconds; the service receives a large policy and keeps it on disk, and every engine reads it"""
SCALE_TIMEOUT = 1800.0
"""seconds; an engine of a large policy takes minutes to start"""
STREAM_SILENCE = 7200.0
"""seconds; longer than a slow engine needs for a group of long responses"""
JSON = "application/json"


def weights(client: Connection) -> Call[WeightsStatus]:
    """The versions in service, the runs that they belong to, and how to push."""
    return _get(WeightsStatus, "/v1/weights")


def speculation(client: Connection) -> Call[SpeculationStatus]:
    """Acceptance since the start, the schedules of draft lengths, and the alarms."""
    return _get(SpeculationStatus, "/v1/speculation")


def model(client: Connection, within: float | None = None) -> Call[dict[str, Any]]:
    """The served policy: `id` (its name), `max_model_len` (most tokens of prompt and response together), and
    `routed_experts` (whether requests may ask for them). `within`:
    seconds to connect, and then to wait for the answer, in place of `timeout` and `read_timeout`."""
    return Call("GET", "/v1/models", served_model, wait=within, connect=within)


def send_prompts(client: Connection, request: PromptsRequest) -> Call[PromptsStatus]:
    """Send groups to generate in the background. Raises RolloutError with 429 when the queue is full (try again after
    `retry_after` seconds) and with 507 when its disk is full. Then no group was taken."""
    return _post(PromptsStatus, "/v1/prompts", request)


def cancel_prompts(client: Connection, run: str) -> Call[None]:
    """Forget the run's groups that are not acknowledged."""
    return _delete("/v1/prompts", run)


def return_leases(client: Connection, run: str) -> Call[None]:
    """Return all groups that the run has leased, because its trainer starts again."""
    return _delete("/v1/batches", run)


def lease(client: Connection, request: LeaseRequest) -> Call[Batch]:
    """Lease finished groups. The batch says why if there are fewer than asked for."""
    return _post(Batch, "/v1/batches/lease", request, wait=request.wait + client.read_timeout)


def acknowledge(client: Connection, lease: str, groups: list[str] | None = None) -> Call[LeaseStatus]:
    """Acknowledge the lease's groups, or those named, as trained on: they are never handed out again. Raises
    RolloutError with 404 when the lease is over."""
    return _post(LeaseStatus, f"/v1/batches/{lease}/ack", LeaseGroups(groups=groups))


def release(client: Connection, lease: str, groups: list[str] | None = None) -> Call[LeaseStatus]:
    """Return the lease's groups, or those named, as not trained on: they are handed out again."""
    return _post(LeaseStatus, f"/v1/batches/{lease}/nack", LeaseGroups(groups=groups))


def extend(client: Connection, lease: str, seconds: float) -> Call[LeaseStatus]:
    """Let the lease end this many seconds from now."""
    wait = min(client.read_timeout, max(1.0, seconds / 4))
    return _post(LeaseStatus, f"/v1/batches/{lease}/extend", LeaseExtension(seconds=seconds), wait)


def batches(client: Connection) -> Call[BatchesStatus]:
    """How many groups are in which state, the leases, and what was generated in vain."""
    return _get(BatchesStatus, "/v1/batches")


def engines(client: Connection) -> Call[FleetStatus]:
    """Every engine: its state, and what it has to do. Needs the admin token where there is a token."""
    return _get(FleetStatus, FLEET_PATH)


def scale(client: Connection, engines: int | Literal["all"], drain: float = 60.0) -> Call[FleetStatus]:
    """Add engines or take some away; returns when that is done. `drain`: seconds that running requests have. Needs the
    admin token where there is a token. Raises RolloutError with 409 when there is no room, or when another change is
    under way."""
    request = ScaleEngines(engines=engines, drain=drain)
    return _post(FleetStatus, FLEET_PATH, request, wait=SCALE_TIMEOUT + drain)


def release_weights(client: Connection, run: str) -> Call[None]:
    """Give up the run's weights when the run ends: they stay in service and belong to no run. If the run has none,
    nothing happens."""
    return _delete("/v1/weights", run)


# --- parts of the methods `rollouts` and `push_weights` ---


def rollouts(groups: list[GroupRequest], model: str | None) -> Call[None]:
    """The answer is a stream, which GroupStream reads."""
    content = _json(RolloutRequest(groups=groups, model=model))
    return Call("POST", "/v1/rollouts", check, content=content, content_type=JSON, wait=STREAM_SILENCE)


def push(of: WeightsOf, version: int, run: str | None, take_over: bool, sent: Sent) -> Call[WeightStatus]:
    params = {"version": str(version)} | ({"run": run} if run else {}) | ({"take_over": "true"} if take_over else {})
    return Call(
        "POST",
        f"/v1/weights/{of}",
        partial(read, WeightStatus),
        params=params | {"checksum": sent.checksum},
        content=sent.content,
        content_type=sent.content_type,
        wait=PUSH_TIMEOUT,
    )


def _get(of: type[M], path: str) -> Call[M]:
    return Call("GET", path, partial(read, of))


def _post(of: type[M], path: str, body: BaseModel, wait: float | None = None) -> Call[M]:
    return Call("POST", path, partial(read, of), content=_json(body), content_type=JSON, wait=wait)


def _delete(path: str, run: str) -> Call[None]:
    return Call("DELETE", path, check, params={"run": run})


def _json(body: BaseModel) -> bytes:
    return body.model_dump_json(exclude_none=True).encode()
