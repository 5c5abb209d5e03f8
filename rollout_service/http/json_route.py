"""JsonRoute: a route whose JSON body is read once and strictly, and whose query has no unknown parameters.

A body must have a content type, and must be uncompressed UTF-8 JSON, without NaN or lone surrogates, and at most about
200 levels deep. Its fields must have the documented types: neither `false` nor "5" is a number.
"""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json, to_json

from rollout_service.http.admission import Refused
from rollout_service.protocol import Problem


class ReadRequest(Request):
    """A request whose body has been read."""

    read: Any = None

    async def json(self) -> Any:
        return self.read


class JsonRoute(APIRoute):
    """Use: `APIRouter(route_class=JsonRoute)`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        parameters = {parameter.alias for parameter in self.dependant.query_params}
        field: Any = self.body_field
        body_type: TypeAdapter[Any] | None = field and TypeAdapter(field.field_info.annotation)

        async def handle(request: Request) -> Response:
            check_query(request, parameters)
            request = ReadRequest(request.scope, request.receive)
            if body_type is not None and (body := await request.body()):
                check_content_type(request)
                request.read = read_strictly(body_type, body)
            return await handler(request)

        return handle


def read_strictly(body_type: TypeAdapter[Any], body: bytes) -> Any:
    """The body as `body_type`. It is validated from its bytes, because FastAPI would first make Python objects of them,
    which fit more types. In JSON 5.0 is an integer, but not in pydantic's strict mode, so it is converted first. Raises
    ValidationError."""
    try:
        return body_type.validate_json(body, strict=True)
    except ValidationError as error:
        whole = [e["loc"] for e in error.errors() if e["type"] == "int_type" and _is_whole(e["input"])]
        if not whole:
            raise
    fields = from_json(body)
    for *path, last in whole:
        part = fields
        for name in path:
            part = part[name]
        part[last] = int(part[last])
    return body_type.validate_json(to_json(fields), strict=True)


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


def check_query(request: Request, known: set[str]) -> None:
    """Raises Refused for a parameter that is not `known`, because a misspelt one must not be ignored."""
    unknown = [name for name in request.query_params if name not in known]
    if unknown:
        there_are = f"this route has {', '.join(sorted(known))}" if known else "this route has none"
        raise Refused([Problem(field=name, message=f"no such query parameter; {there_are}") for name in unknown])


def check_content_type(request: Request) -> None:
    """Raises Refused (415) for a body whose headers do not say that it is plain JSON."""
    given = request.headers.get("content-type", "")
    kind = given.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        has = f"is {given!r}" if given else "is missing"
        raise Refused([Problem(field="Content-Type", message=f"{has}: send application/json")], status=415)
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        message = f"{encoding} is not unpacked here; send the body uncompressed, without a Content-Encoding"
        raise Refused([Problem(field="Content-Encoding", message=message)], status=415)


def read_object(request: Request, body: bytes) -> dict[str, Any]:
    """The JSON object in the body. Raises Refused when the body is not one."""
    check_content_type(request)
    try:
        fields = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        hint = "; NaN and Infinity are not JSON numbers" if b"NaN" in body or b"Infinity" in body else ""
        raise Refused([Problem(field="body", message=f"is not JSON: {error}{hint}")]) from None
    if not isinstance(fields, dict):
        raise Refused([Problem(field="body", message="must be a JSON object")])
    return fields
