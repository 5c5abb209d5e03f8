"""POST /inference/v1/generate, and the routes between text and tokens: vLLM's own handlers, in an engine."""

from fastapi import APIRouter, Request, Response

from rollout_service.http.json_route import JsonRoute
from rollout_service.http.routes.openai import generation, passed_on

router = APIRouter(tags=["Tokens (vLLM's own handlers)"], route_class=JsonRoute)


@router.post("/inference/v1/generate")
async def generate(request: Request) -> Response:
    """Token ids in, token ids out: vLLM's route of this name, with all its fields. Log-probabilities name each token as
    `token_id` and as `token`."""
    return await generation(request, "sampling_params")


@router.post("/v1/completions/render")
async def render_completions(request: Request) -> Response:
    """The bodies for /inference/v1/generate that a body of /v1/completions stands for, one for each prompt."""
    return (await passed_on(request))[0]


@router.post("/v1/chat/completions/render")
async def render_chat_completions(request: Request) -> Response:
    """The body for /inference/v1/generate that a body of /v1/chat/completions stands for, with the chat template's
    tokens."""
    return (await passed_on(request))[0]


@router.post("/tokenize")
async def tokenize(request: Request) -> Response:
    """The tokens of a prompt, or of chat messages as the chat template renders them."""
    return (await passed_on(request))[0]


@router.post("/detokenize")
async def detokenize(request: Request) -> Response:
    """The text of tokens."""
    return (await passed_on(request))[0]
