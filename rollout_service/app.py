"""The HTTP front: the routes over one fleet, the token, the body limit, and errors that name the field."""

import secrets
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.types import Receive, Scope, Send

from rollout_service.admission import Admission, Refused
from rollout_service.background import BackgroundGeneration
from rollout_service.batches import RETRY_AFTER, BatchQueue, Unavailable, UnknownLease
from rollout_service.fleet import Fleet
from rollout_service.member import FleetError
from rollout_service.protocol import ErrorBody, Problem
from rollout_service.routes import batches, openai, rollouts, status, weights
from rollout_service.telemetry import Telemetry
from rollout_service.weights import RefusedUpdate


def load_tokenizer(folder: Path) -> Any:
    """Of the policy in `folder`. Two seconds, most of them transformers' import."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def make_app(fleet: Fleet, tokenizer: Any) -> FastAPI:
    """The application over a started fleet and its policy's tokenizer."""
    config = fleet.config
    app = FastAPI(title="rollout-service", summary="RL rollouts with lossless speculative decoding", version="0.1.0")
    app.state.fleet = fleet
    app.state.telemetry = telemetry = Telemetry()
    fleet.alarms.on_alarm = lambda kind: telemetry.alarms.labels(kind).inc()
    app.state.admission = Admission(
        config.served_name,
        tokenizer,
        vocab_size=fleet.policy_config["vocab_size"],
        context_limit=config.context_limit,
        drafting=config.drafter.kind != "none",
        on_cpu=fleet.device == "cpu",
    )
    queue = BatchQueue(fleet.state.queue if fleet.state else None, config.queue.capacity, config.queue.disk_mib)
    app.state.background = BackgroundGeneration(fleet, queue, app.state.telemetry)
    for module in (rollouts, batches, weights, openai, status):
        app.include_router(module.router)
    add_error_handlers(app)
    token = config.token.get_secret_value() if config.token else None
    app.add_middleware(Guard, token=token, body_limit=config.body_limit_mib << 20)
    return app


def answer(status_code: int, error: str, problems: list[Problem] | None = None) -> JSONResponse:
    return JSONResponse(ErrorBody(error=error, problems=problems or []).model_dump(), status_code)


def add_error_handlers(app: FastAPI) -> None:
    """Every known error becomes an ErrorBody."""

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError | ValidationError)
        problems = [
            Problem(field=".".join(str(part) for part in e["loc"] if part != "body") or "body", message=e["msg"])
            for e in error.errors()
        ]
        return answer(400, f"{len(problems)} field(s) of the request are wrong", problems)

    async def refused(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, Refused | RefusedUpdate)
        return answer(error.status, str(error), error.problems)

    async def unfinished(_: Request, error: Exception) -> JSONResponse:
        return answer(503, str(error))

    async def no_room(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, Unavailable)
        response = answer(error.status, str(error))
        response.headers["Retry-After"] = str(RETRY_AFTER)
        return response

    async def unknown_lease(_: Request, error: Exception) -> JSONResponse:
        message = f"no such lease: {error}; it was acknowledged or returned, or it is over"
        return answer(404, message, [Problem(field="lease", message=message)])

    app.add_exception_handler(Unavailable, no_room)
    app.add_exception_handler(UnknownLease, unknown_lease)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(ValidationError, invalid)
    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(RefusedUpdate, refused)
    app.add_exception_handler(FleetError, unfinished)


class Guard:
    """ASGI middleware: the bearer token on all routes but /health, and the size of every body but those of weights.

    Plain ASGI, so that a disconnection reaches the route that streams.
    """

    def __init__(self, app: Any, token: str | None, body_limit: int):
        self.app, self.token, self.body_limit = app, token, body_limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self.refusal(Request(scope)) if scope["type"] == "http" else None
        await (refusal or self.app)(scope, receive, send)

    def refusal(self, request: Request) -> JSONResponse | None:
        path = request.url.path
        if self.token is not None and path != "/health":
            given = request.headers.get("authorization", "")
            if not secrets.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
                return answer(401, "this service asks for its token: Authorization: Bearer <token>")
        if path.startswith("/v1/weights/"):  # limited by the tensors' own size, while it is received
            return None
        length = request.headers.get("content-length")
        if length is None and "transfer-encoding" in request.headers:
            return answer(411, "a body needs a Content-Length", [Problem(field="body", message="no Content-Length")])
        if length is not None and int(length) > self.body_limit:
            message = f"{length} bytes, and the limit is {self.body_limit} (body_limit_mib)"
            return answer(413, f"the request body is too large: {message}", [Problem(field="body", message=message)])
        return None
