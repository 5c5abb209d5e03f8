"""Errors as answers: an ErrorBody, and on OpenAI's routes the form that OpenAI's clients read."""

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from rollout_service.fleet.member import FleetError
from rollout_service.http.admission import Refused
from rollout_service.protocol import ErrorBody, Problem
from rollout_service.queue.database import Unavailable
from rollout_service.queue.finished_groups import UnknownLease
from rollout_service.transports import RefusedUpdate

logger = logging.getLogger("rollout_service")
CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that left before the end of its answer"""
RETRY_AFTER = 5
"""seconds after which a client should try again if it was refused because there was no room or no engine"""
HEADERS = {
    401: {"WWW-Authenticate": "Bearer"},
    429: {"Retry-After": str(RETRY_AFTER)},
    503: {"Retry-After": str(RETRY_AFTER)},
    507: {"Retry-After": str(RETRY_AFTER)},
}
"""headers of every answer with this status"""
OPENAI_PATHS = {
    "/v1/completions", "/v1/completions/render", "/v1/chat/completions", "/v1/chat/completions/render", "/v1/models",
    "/inference/v1/generate", "/tokenize", "/detokenize",
}  # fmt: skip
"""paths of the routes whose errors have OpenAI's form; those of a single model are the others"""


def answer(
    request: Request,
    status: int,
    error: str,
    problems: list[Problem] | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """An error in the form of the request's route."""
    if is_openai(request.url.path):
        body = openai_error(status, error, problems)
    else:
        body = ErrorBody(error=error, problems=problems or []).model_dump(exclude_none=True)
    return JSONResponse(body, status, HEADERS.get(status, {}) | dict(headers or {}))


def is_openai(path: str) -> bool:
    return path in OPENAI_PATHS or path.startswith("/v1/models/")


def openai_error(status: int, error: str, problems: list[Problem] | None = None) -> dict[str, Any]:
    """In the form of vLLM's own: `{"error": {"message", "type": "BadRequestError", "param", "code": 400}}`."""
    kind = HTTPStatus(status).phrase.replace(" ", "").removesuffix("Error") + "Error"
    message = "; ".join(f"{p.field}: {p.message}" for p in problems) if problems else error
    param = problems[0].field if problems else None
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error that a route raises, unexpected ones included."""

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError | ValidationError)
        problems = [Problem(field=_field(e["loc"]), message=e["msg"]) for e in error.errors()]
        return answer(request, 400, f"{len(problems)} field(s) of the request are wrong", problems)

    async def refused(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, Refused | RefusedUpdate)
        return answer(request, error.status, str(error), error.problems)

    async def unfinished(request: Request, error: Exception) -> JSONResponse:
        return answer(request, 503, str(error))

    async def no_room(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, Unavailable)
        return answer(request, error.status, str(error))

    async def unknown_lease(request: Request, error: Exception) -> JSONResponse:
        message = f"no such lease: {error}; it was acknowledged or returned, or its time is over"
        return answer(request, 404, message, [Problem(field="lease", message=message)])

    async def not_routed(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        headers, message = dict(error.headers or {}), str(error.detail)
        if error.status_code == 404:
            message = f"no such path: {request.url.path}; GET /docs lists all paths"
        if error.status_code == 405:  # Starlette names only the methods of the first route of this path
            headers["Allow"] = ", ".join(sorted(methods_of(app, request)))
            message = f"this path does not take {request.method}; use {headers['Allow']}"
        return answer(request, error.status_code, message, headers=headers)

    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        logger.error("%s %s failed: %s", request.method, request.url.path, type(error).__name__)  # uvicorn has the rest
        return answer(request, 500, f"the service failed: {type(error).__name__}; its log has the cause")

    for kind, handler in {
        RequestValidationError: invalid,
        ValidationError: invalid,
        Refused: refused,
        RefusedUpdate: refused,
        FleetError: unfinished,
        Unavailable: no_room,
        UnknownLease: unknown_lease,
        HTTPException: not_routed,
        Exception: unforeseen,
    }.items():
        app.add_exception_handler(kind, handler)


def methods_of(app: FastAPI, request: Request) -> set[str]:
    """The methods of all routes of the request's path."""
    return {
        method
        for route in app.routes
        if route.matches(request.scope)[0] is not Match.NONE
        for method in getattr(route, "methods", ())
    }


def _field(location: tuple[int | str, ...]) -> str:
    """`groups.3.sampling.top_p`, or `body` for the whole body."""
    return ".".join(str(part) for part in location if part not in ("body", "query", "path")) or "body"
