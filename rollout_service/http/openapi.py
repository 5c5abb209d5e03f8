"""The OpenAPI document: FastAPI's, with the statuses that occur, the token, and the limits of this policy."""

from typing import Any

from fastapi import FastAPI

from rollout_service.fleet.fleet import Fleet
from rollout_service.http.errors import is_openai
from rollout_service.http.openai_requests import BOUNDS
from rollout_service.http.tokens import OPEN_PATHS
from rollout_service.lossless import described
from rollout_service.protocol import CONTROL_PATHS, RECORD, RETURN_RECORD, ErrorBody, RolloutRecord

MEANINGS = {
    400: "The request is wrong; the body names the wrong fields and says what to do",
    401: "The token is missing or wrong",
    403: "The route asks for the admin token, or is not offered, for the reason in the body",
    404: "There is no such model, lease or weight set",
    405: "The path does not take this method; the header Allow names those that it takes",
    408: "The body arrived too slowly",
    409: "The request contradicts what the service already holds",
    413: "The body is larger than the limit",
    415: "The headers do not say that the body is plain JSON",
    429: "The queue is full; try again after Retry-After seconds",
    500: "The service failed; its log has the cause",
    503: "The service is starting or stopping, or no engine could answer; try again after Retry-After seconds",
    507: "The disk is full, or the queue's share of it",
}
VLLM = "vllm."
"""prefix of the names of vLLM's types, because types of ours have some of the same names"""
ALWAYS = 400, 500, 503
WITH_BODY = 408, 413, 415
MORE: dict[str, tuple[int, ...]] = {
    "/v1/rollouts": (404,),
    "/v1/prompts": (404, 409, 429, 507),
    "/v1/batches/lease": (507,),
    "/v1/batches/{lease}/ack": (404, 507),
    "/v1/batches/{lease}/nack": (404, 507),
    "/v1/batches/{lease}/extend": (404, 507),
    "/v1/batches": (507,),
    "/v1/weights/{of}": (404, 409, 507),
    "/v1/models/{model}": (404,),
    "/v1/fleet/engines": (409,),
    "/resume": (409,),
    "/start_weight_update": (409, 507),
    "/start_draft_weight_update": (409, 507),
    "/update_weights": (409, 507),
    "/finish_weight_update": (409, 507),
    "/update_weight_version": (409, 507),
    "/collective_rpc": (403,),
    "/v1/completions": (404,),
    "/v1/completions/render": (404,),
    "/v1/chat/completions": (404,),
    "/v1/chat/completions/render": (404,),
    "/inference/v1/generate": (404,),
    "/tokenize": (404,),
    "/detokenize": (404,),
}
"""further statuses of single paths"""
SECURITY = {
    "token": {"type": "http", "scheme": "bearer"},
    "admin_token": {"type": "http", "scheme": "bearer", "description": "Opens the control routes and every other one"},
}
GENERATED: dict[str, Any] = {
    "application/json": {"schema": {"type": "object", "properties": {"choices": {"type": "array", "items": {
        "type": "object", "properties": {RECORD: {"$ref": "#/components/schemas/RolloutRecord"}},
    }}}}},
    "text/event-stream": {"schema": {"description": "Events with chunks of the answer as their data, then [DONE]"}},
}  # fmt: skip
"""answers of vLLM's routes that generate, with what the service adds to vLLM's own types"""
OPENAI_ERROR = {
    "title": "OpenAIError",
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["integer", "string", "null"]},
            },
        }
    },
}


def describe(app: FastAPI, fleet: Fleet, with_token: bool) -> None:
    """Let GET /openapi.json answer with the completed document."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = plain()
            schemas = document["components"]["schemas"]
            for unused in ("HTTPValidationError", "ValidationError"):
                schemas.pop(unused, None)
            schemas["ErrorBody"] = ErrorBody.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas["ErrorBody"].pop("$defs", None)
            record = RolloutRecord.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas |= record.pop("$defs") | {"RolloutRecord": record}
            schemas["OpenAIError"] = OPENAI_ERROR
            add_limits(schemas, fleet)
            for parameter in document["paths"]["/v1/models/{model}"]["get"]["parameters"]:
                parameter["schema"]["enum"] = [fleet.config.served_name]
            schemas["Sampling"]["description"] += f"\n\n{described('rollouts')}"
            for path, operations in document["paths"].items():
                for operation in operations.values():
                    if schema := fleet.openai_schemas.get(path):
                        body = {"application/json": {"schema": add_schema(schemas, schema)}}
                        operation["requestBody"] = {"required": True, "content": body}
                        if RETURN_RECORD in schema["properties"]:  # the routes that generate
                            operation["description"] += f"\n\n{described('openai')}"
                            operation["responses"]["200"]["content"] = GENERATED
                    add_errors(path, operation, with_token)
            if with_token:
                document["components"]["securitySchemes"] = SECURITY
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def add_errors(path: str, operation: dict[str, Any], with_token: bool) -> None:
    responses = operation["responses"]
    responses.pop("422", None)
    statuses = {*ALWAYS, *MORE.get(path, ())}
    if "requestBody" in operation:
        statuses |= {*WITH_BODY}
    if with_token and path not in OPEN_PATHS:
        is_control = path in CONTROL_PATHS
        statuses |= {401, 403} if is_control else {401}
        operation["security"] = [{"admin_token": []}] if is_control else [{"token": []}, {"admin_token": []}]
    form = "OpenAIError" if is_openai(path) else "ErrorBody"
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{form}"}}}
    for status in sorted(statuses):
        responses.setdefault(str(status), {"description": MEANINGS[status], "content": content})


def add_limits(schemas: dict[str, Any], fleet: Fleet) -> None:
    """Put the limits of this service's policy in place of the interface's wider ones."""
    longest = fleet.config.context_limit - 1
    tokens = schemas["GroupRequest"]["properties"]["prompt_token_ids"]["anyOf"][0]
    tokens["maxItems"] = longest
    tokens["items"]["maximum"] = fleet.policy_config["vocab_size"] - 1
    for name in ("max_tokens", "min_tokens"):
        schemas["Sampling"]["properties"][name]["maximum"] = longest


def add_schema(schemas: dict[str, Any], schema: dict[str, Any]) -> dict[str, str]:
    """Add vLLM's type of a body and its `$defs` to the document's schemas, with the bounds that are checked before vLLM
    sees the body. Returns a reference to it."""
    own = dict(schema) | {"additionalProperties": False}
    schemas.update({f"{VLLM}{name}": part for name, part in own.pop("$defs", {}).items()})
    own["properties"] = {name: dict(part) for name, part in own["properties"].items()}
    for name, (least, most) in BOUNDS.items():
        if name in own["properties"]:
            own["properties"][name] |= {"minimum": least, "maximum": most}
    schemas[f"{VLLM}{own['title']}"] = own
    return {"$ref": f"#/components/schemas/{VLLM}{own['title']}"}
