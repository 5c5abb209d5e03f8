"""GET /v1/models, /v1/models/{model}: the served policy. The front answers them, even while no engine is in service."""

import time
from typing import Literal

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse
from pydantic import BaseModel

from rollout_service.http.json_route import JsonRoute

router = APIRouter(tags=["OpenAI-compatible (vLLM's own handlers)"], route_class=JsonRoute)
SINCE = int(time.time())
"""when the service started, in seconds since 1970"""


class ServedModel(BaseModel):
    """vLLM's ModelCard, without its list of permissions, and with `routed_experts`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "vllm"
    root: str
    parent: str | None = None
    max_model_len: int
    routed_experts: bool


class ServedModels(BaseModel):
    object: Literal["list"] = "list"
    data: list[ServedModel]


@router.get("/v1/models")
async def models(request: Request) -> ServedModels:
    """The served policy, as vLLM describes it. `max_model_len` is the most tokens of a prompt and its response together
    that a request may have. With a drafter it is less than `engine.max_model_len`. `routed_experts` is whether requests
    may ask for them."""
    return ServedModels(data=[served(request)])


@router.get("/v1/models/{model:path}")
async def model(request: Request, model: str) -> ServedModel:
    """The served policy by its name, which may have slashes."""
    if not model:  # Starlette's own redirect, which this path would hide
        return RedirectResponse("/v1/models", 307)  # type: ignore[return-value]
    request.app.state.admission.check_model(model)
    return served(request)


def served(request: Request) -> ServedModel:
    config = request.app.state.fleet.config
    name = config.served_name
    return ServedModel(
        id=name,
        created=SINCE,
        root=name,
        max_model_len=config.context_limit,
        routed_experts=config.engine.routed_experts,
    )
