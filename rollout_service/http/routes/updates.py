"""POST /start_weight_update, /update_weights, /finish_weight_update: vLLM's routes. Each update ends as one push.

POST /update_weight_version, /weight_checker, GET /weight_info: the version in service, and what engines hold.
"""

from typing import Any

from fastapi import APIRouter, Request

from rollout_service.fleet.updates import Pushed
from rollout_service.http.admission import Refused
from rollout_service.http.control_route import ControlRoute
from rollout_service.http.routes.pausing import fleet_of, to_its_end
from rollout_service.protocol import (
    CheckWeights,
    FinishUpdate,
    InitTransfer,
    NewVersion,
    Problem,
    Relabelled,
    UpdateMessage,
    UpdateWeights,
    WeightCheck,
    WeightInfo,
)

router = APIRouter(tags=["control"], route_class=ControlRoute)


@router.post("/init_weight_transfer_engine")
async def init_weight_transfer_engine(request: Request, body: InitTransfer) -> UpdateMessage:
    """Connect a trainer's NCCL group, or agree on CUDA IPC, by vLLM's own transfer. On GPUs only.

    The service is one receiver: its rank in the trainer's group is `rank_offset`, and the group has one more member
    than the trainer. A weight update that another trainer left open is dropped.
    """
    await to_its_end(fleet_of(request).updates.open_transfer(body.init_info))
    return UpdateMessage(message="Weight transfer initialized")


@router.post("/shutdown_weight_transfer_engine")
async def shutdown_weight_transfer_engine(request: Request) -> UpdateMessage:
    """Disconnect the trainer. Nothing happens if none is connected."""
    await to_its_end(fleet_of(request).updates.close_transfer())
    return UpdateMessage(message="Weight transfer shut down")


@router.post("/start_weight_update")
async def start_weight_update(request: Request) -> UpdateMessage:
    """Open a weight update of the policy. Nothing changes before `/finish_weight_update`.

    While one is open, another is 409. One that is silent for 300 seconds is dropped.
    """
    await to_its_end(fleet_of(request).updates.start("policy"))
    return UpdateMessage(message="Weight update started")


@router.post("/start_draft_weight_update")
async def start_draft_weight_update(request: Request) -> UpdateMessage:
    """Open a weight update of the drafter. Nothing changes before `/finish_weight_update`."""
    await to_its_end(fleet_of(request).updates.start("drafter"))
    return UpdateMessage(message="Draft weight update started")


@router.post("/update_weights")
async def update_weights(request: Request, body: UpdateWeights) -> UpdateMessage:
    """Add tensors to the open update, as often as needed. They are cast to the service's dtype.

    With `weight_dir` instead of `update_info`, the safetensors files of a folder become the next version at once,
    without start and finish. An update that fails is over, and has changed nothing.
    """
    updates = fleet_of(request).updates
    if (body.update_info is None) == (body.weight_dir is None):
        message = "give exactly one of update_info and weight_dir"
        raise Refused([Problem(field="update_info", message=message)])
    if body.weight_dir is not None:
        pushed = await updates.push_folder("policy", body.weight_dir)
        return _in_service(request, "Weights updated", pushed)
    left_out = await to_its_end(updates.update(_for_one_receiver(body.update_info)))
    return UpdateMessage(message="Weights updated", ignored=left_out)


def _for_one_receiver(info: Any) -> dict[str, Any]:
    """vLLM takes a list with an entry for each rank."""
    if isinstance(info, list):
        if len(info) != 1:
            message = f"has {len(info)} entries, one for each rank; this service is one receiver (/get_world_size)"
            raise Refused([Problem(field="update_info", message=message)])
        return info[0]
    return info


@router.post("/finish_weight_update")
async def finish_weight_update(request: Request, body: FinishUpdate | None = None) -> UpdateMessage:
    """Push the open update as one version. The answer comes when every engine holds it and it is published.

    A tensor that has not come is 400, and the weights in service stay.
    """
    version = body.weight_version if body is not None else None
    pushed = await to_its_end(fleet_of(request).updates.finish(version))
    return _in_service(request, "Weight update finished", pushed)


def _in_service(request: Request, message: str, pushed: Pushed) -> UpdateMessage:
    request.app.state.telemetry.pushed(pushed.of, pushed.status)
    return UpdateMessage(message=message, weight_version=str(pushed.status.version), ignored=pushed.left_out)


@router.post("/update_weight_version")
async def update_weight_version(request: Request, body: NewVersion) -> Relabelled:
    """Give the policy in service a higher version on every engine. Restarted engines keep it."""
    await to_its_end(fleet_of(request).updates.relabel(body.new_version))
    return Relabelled(new_version=body.new_version)


@router.get("/weight_info")
async def weight_info(request: Request) -> WeightInfo:
    """The policy's version in service."""
    return WeightInfo(weight_version=str(fleet_of(request).store.version("policy")))


@router.post("/weight_checker", response_model_exclude_none=True)
async def weight_checker(request: Request, body: CheckWeights) -> WeightCheck:
    """Checksums of what every engine holds, or a comparison of them with earlier ones.

    503 when engines differ. `reset` is refused.
    """
    if body.action == "reset":
        message = "is not offered: it would put zeros into service; push the weights that you want instead"
        raise Refused([Problem(field="action", message=message)])
    if body.action == "compare" and body.baseline is None:
        raise Refused([Problem(field="baseline", message="is missing: give the checksums to compare with")])
    fleet_of(request).pausing.check_awake()
    checksums = await fleet_of(request).controls.weight_checksums()
    if body.baseline is None or body.action == "checksum":
        return WeightCheck(checksums=checksums)
    mismatches = sorted({name for name, _ in checksums.items() ^ body.baseline.items()})
    return WeightCheck(match=not mismatches, mismatches=mismatches)
