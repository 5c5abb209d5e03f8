"""ControlRoute: a JsonRoute whose body needs no content type, because trainers often send none."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response

from rollout_service.http.json_route import JsonRoute


class ControlRoute(JsonRoute):
    """Use: `APIRouter(route_class=ControlRoute)`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        strict = super().get_route_handler()

        async def handle(request: Request) -> Response:
            given = [(name, value) for name, value in request.scope["headers"] if name != b"content-type"]
            headers = [*given, (b"content-type", b"application/json")]
            return await strict(Request(dict(request.scope) | {"headers": headers}, request.receive))

        return handle
