"""GET /get_world_size, /server_info: how trainers find out what this server is. POST /collective_rpc: not offered."""

from typing import Literal

from fastapi import APIRouter, Request

from rollout_service.engine.server_info import without_secrets
from rollout_service.http.admission import Refused
from rollout_service.http.control_route import ControlRoute
from rollout_service.http.routes.pausing import fleet_of
from rollout_service.protocol import Problem, ServerInfo, WorldSize

router = APIRouter(tags=["control"], route_class=ControlRoute)


@router.get("/get_world_size")
async def get_world_size(request: Request, include_dp: bool = True) -> WorldSize:
    """The receivers of a trainer's transfer: always 1, however many engines and GPUs there are."""
    return WorldSize(world_size=1)


@router.get("/server_info")
async def server_info(request: Request, config_format: Literal["json", "text"] = "text") -> ServerInfo:
    """vLLM's configuration of an engine, its settings and its system, without secrets."""
    fleet = fleet_of(request)
    info = await fleet.controls.server_info(config_format)
    tokens = filter(None, [fleet.config.token, fleet.config.admin_token])
    return ServerInfo(**without_secrets(info, [token.get_secret_value() for token in tokens]))


@router.post("/collective_rpc")
async def collective_rpc(request: Request) -> None:
    """Not offered: it runs any method in the engines' workers, which could break every promise of this service."""
    message = (
        "is not offered: it runs any method in the workers, which could change weights and sampling unseen. Use "
        "/update_weights, /pause, /sleep, /weight_checker or /server_info instead"
    )
    raise Refused([Problem(field="collective_rpc", message=message)], status=403)
