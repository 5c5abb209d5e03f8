"""Pages of the HTTP interface, docs/reference/http/: its routes and types, from the service's OpenAPI document."""

from collections.abc import Iterator
from functools import cache
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI

from generate.markdown import code, compose, fill, marked, sentence, table
from generate.schema import FIELDS, Link, Schema, default_of, fields, type_of
from rollout_service.http.openapi import MEANINGS, VLLM, describe
from rollout_service.http.routes import MODULES
from rollout_service.protocol import INTERFACE_VERSION, RETURN_RECORD, VERSION_HEADER

UNLIMITED = 2**31
"""more than any policy's context or vocabulary, so that the interface's own limits show"""
ROUTERS = {module.__name__.rpartition(".")[2]: module for module in MODULES}
"""by the name of their page"""
GLOSSES = {
    "rollouts": "Groups of prompts in, a stream of finished groups out: the route and its types.",
    "batches": "Groups that are generated in the background and handed out under leases: the routes and their types.",
    "weights": "New weights into running engines, and the versions in service: the routes and their types.",
    "openai": "The routes that vLLM answers in OpenAI's form.",
    "models": "The served policy, as OpenAI's clients and vLLM's clients read it.",
    "probes": "What load balancers and clients of vLLM ask a server before they use it.",
    "generate": "The routes of vLLM's that take and give token ids.",
    "status": "Health, readiness, metrics, and the state of speculation: the routes and their types.",
    "fleet": "The engines, and their number while the service runs.",
    "pausing": "vLLM's routes that pause the fleet, end requests, reset caches, and let engines sleep.",
    "updates": "vLLM's routes for weight updates of several calls, and for the version in service.",
    "server": "What trainers read of the server before they train.",
}
TITLES = {"openai": "HTTP: OpenAI's routes", "generate": "HTTP: token ids"}
VLLM_BODIES = {
    "/v1/completions": "CompletionRequest", "/v1/completions/render": "CompletionRequest",
    "/v1/chat/completions": "ChatCompletionRequest", "/v1/chat/completions/render": "ChatCompletionRequest",
    "/inference/v1/generate": "GenerateRequest", "/tokenize": "TokenizeRequest", "/detokenize": "DetokenizeRequest",
}  # fmt: skip
"""vLLM's types of the bodies of its own routes"""
GENERATES = "/v1/completions", "/v1/chat/completions", "/inference/v1/generate"
ERRORS = "ErrorBody", "Problem", "OpenAIError"
"""types of every page's errors, which stand on the first"""


@cache
def document() -> dict[str, Any]:
    app = FastAPI(title="rollout-service", version="0")
    for module in ROUTERS.values():
        app.include_router(module.router)
    body: Schema = {"type": "object"}
    own: dict[bool, Schema] = {True: {RETURN_RECORD: {"type": "boolean"}}, False: {}}
    fleet: Any = SimpleNamespace(
        config=SimpleNamespace(context_limit=UNLIMITED, served_name="policy"),
        policy_config={"vocab_size": UNLIMITED},
        openai_schemas={
            path: body | {"title": name, "properties": own[path in GENERATES]} for path, name in VLLM_BODIES.items()
        },
    )
    describe(app, fleet, with_token=True)
    found = app.openapi()
    schemas = found["components"]["schemas"]
    for operation in (operation for path in found["paths"].values() for operation in path.values()):
        for content in operation.get("requestBody", {}).get("content", {}).values():
            if (name := content["schema"].get("title")) and "properties" in content["schema"]:
                schemas[name], content["schema"] = content["schema"], _reference(name)
    # OpenAPI cannot describe a stream of lines: a list comes nearest.
    lines = found["paths"]["/v1/rollouts"]["post"]["responses"]["200"]["content"][ROUTERS["rollouts"].NDJSON]
    lines["schema"] = {"type": "array", "items": {"anyOf": [_reference("Group"), _reference("ErrorBody")]}}
    return found


def _reference(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


class Types:
    """Where each type stands: on the page of the first route that refers to it."""

    def __init__(self, schemas: dict[str, Schema]):
        self.schemas = schemas
        self.page_of = dict.fromkeys(ERRORS, "index")

    def place(self, page_name: str, schema: Any) -> None:
        """The types that `schema` refers to, and those that they refer to, are `page_name`'s where none has them."""
        for name in referred(schema):
            if name not in self.page_of and not name.startswith(VLLM):
                self.page_of[name] = page_name
                self.place(page_name, self.schemas[name])

    def on(self, page_name: str) -> Iterator[str]:
        for name, where in self.page_of.items():
            if where == page_name:
                schema = self.schemas[name]
                described = schema.get("description", "")
                rows = fields(schema, lambda other: self.link(other, page_name))
                yield "\n\n".join(filter(None, [f"### {name}", described, table(FIELDS, rows) if rows else ""]))

    def link(self, name: str, from_page: str) -> str:
        if name.startswith(VLLM):
            return f"vLLM's `{name.removeprefix(VLLM)}`"
        where = self.page_of[name]
        return f"[{name}]({'' if where == from_page else f'{where}.md'}#{name.lower()})"


def referred(schema: Any) -> Iterator[str]:
    """Names of the types in a schema."""
    if isinstance(schema, dict):
        if "$ref" in schema:
            yield schema["$ref"].rsplit("/", 1)[-1]
        for part in schema.values():
            yield from referred(part)
    elif isinstance(schema, list):
        for part in schema:
            yield from referred(part)


def pages() -> dict[str, str]:
    paths, types = document()["paths"], Types(document()["components"]["schemas"])
    routes = {
        name: [
            (method.upper(), path, paths[path][method])
            for path in dict.fromkeys(route.path_format for route in module.router.routes)
            for method in paths[path]
        ]
        for name, module in ROUTERS.items()
    }
    for name, operations in routes.items():
        for _, _, operation in operations:
            types.place(name, operation)
    found = {name: _page(name, operations, types) for name, operations in routes.items()}
    return {f"reference/http/{name}.md": text for name, text in ({"index": _index(routes, types)} | found).items()}


def _index(routes: dict[str, list[tuple[str, str, dict[str, Any]]]], types: Types) -> str:
    rows = [
        (f"[`{method} {path}`]({name}.md#{_anchor(method, path)})", _first(operation["description"]))
        for name, operations in routes.items()
        for method, path, operation in operations
    ]
    statuses = [(str(status), HTTPStatus(status).phrase, said) for status, said in MEANINGS.items()]
    return compose(
        "HTTP routes, statuses and errors",
        "Every route of the service, what each status means, and the body of an error.",
        "the OpenAPI document of the service",
        fill(
            "A running service answers `GET /openapi.json` with this document, and shows it at `/docs`. There the "
            "limits are those of the served policy, which has a context and a vocabulary. These pages show the "
            "interface's own limits."
        ),
        fill(
            "A service that has a token asks for it (`Authorization: Bearer TOKEN`) on every route but `/health` and "
            f"`/ping`. Control routes ask for the admin token instead. A client may send the interface's version, "
            f"{INTERFACE_VERSION}, in the header `{VERSION_HEADER}`; the service answers 400 to any other version."
        ),
        "## Routes",
        table(("route", "what it does"), rows),
        "## Statuses",
        table(("status", "name", "when"), statuses),
        "## Errors",
        *types.on("index"),
    )


def _page(name: str, operations: list[tuple[str, str, dict[str, Any]]], types: Types) -> str:
    parts = [_operation(name, *operation, types) for operation in operations]
    shown = list(types.on(name))
    return compose(
        TITLES.get(name, f"HTTP: {name}"),
        GLOSSES[name],
        f"[{name}.py](../../../rollout_service/http/routes/{name}.py) and the types that it names",
        "## Routes",
        *parts,
        *(["## Types", *shown] if shown else []),
    )


def _operation(name: str, method: str, path: str, operation: dict[str, Any], types: Types) -> str:
    def link(other: str) -> str:
        return types.link(other, name)

    parts = [f"### {method} {path}", operation["description"]]
    if parameters := operation.get("parameters"):
        rows = []
        for parameter in parameters:
            required = [parameter["name"]] if parameter["required"] else []
            schema = {"properties": {parameter["name"]: parameter["schema"]}, "required": required}
            type_ = type_of(parameter["schema"], link).removesuffix(", or null")
            default = default_of(parameter["name"], schema).replace("computed", "not set")
            rows.append((code(parameter["name"]), parameter["in"], type_, default))
        parts.append(table(("parameter", "in", "type", "default"), rows))
    facts = []
    if body := operation.get("requestBody"):
        facts.append(f"- Body: {_contents(body['content'], link)}")
    responses = operation["responses"]
    facts.append(f"- Answer: {_contents(responses['200'].get('content', {}), link)}")
    said = {int(answer): response["description"] for answer, response in responses.items() if answer != "200"}
    facts.append(f"- [Errors](index.md#statuses): {', '.join(map(str, sorted(said)))}")
    facts += [f"- {answer}: {sentence(text)}" for answer, text in said.items() if text != MEANINGS[answer]]
    return "\n\n".join([*parts, "\n".join(facts)])


def _contents(content: dict[str, Any], link: Link) -> str:
    """LeaseRequest (`application/json`)"""
    return ", or ".join(f"{type_of(part['schema'], link)} ({code(kind)})" for kind, part in content.items())


def _first(description: str) -> str:
    return marked(description.partition("\n\n")[0].split(". ")[0].rstrip("."))


def _anchor(method: str, path: str) -> str:
    return "".join(c for c in f"{method} {path}".lower() if c.isalnum() or c in " -_").replace(" ", "-")
