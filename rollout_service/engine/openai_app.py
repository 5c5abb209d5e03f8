"""vLLM's own OpenAI-compatible application over an engine of ours, inside the engine's actor."""

from types import SimpleNamespace
from typing import Any

from rollout_service.config import ServiceConfig
from rollout_service.engine.openai_arguments import openai_arguments
from rollout_service.engine.rollout_record import RECORDED, RolloutRecords
from rollout_service.protocol import RETURN_RECORD
from rollout_service.vllm_plugin.generate_parameters import GENERATE_PARAMETERS
from rollout_service.vllm_plugin.grammars import GRAMMARS
from rollout_service.vllm_plugin.required_prefix import FIELD as REQUIRED_PREFIX_FIELD
from rollout_service.vllm_plugin.required_prefix import REQUIRED_PREFIX
from rollout_service.vllm_plugin.token_names import TOKEN_NAMES
from rollout_service.vllm_plugin.unsendable import UNSENDABLE

OWN_FIELDS: dict[str, dict[str, Any]] = {
    RETURN_RECORD: {
        "anyOf": [{"type": "boolean"}, {"type": "null"}], "default": False, "title": "Return Rollout Record",
        "description": "If true, each choice of the answer has its `rollout_record`.",
    },
    REQUIRED_PREFIX_FIELD: {
        "anyOf": [{"type": "array", "items": {"type": "integer"}}, {"type": "null"}],
        "default": None, "title": "Required Prefix Token Ids",
        "description": "The prompt's token ids begin with exactly these, the tokens of the turns before as they were "
        "sampled. What the chat template writes after these turns follows. Messages that cannot be continued from "
        "them are refused.",
    },
}  # fmt: skip
"""fields that the service adds to vLLM's request types"""


async def openai_app(llm: Any, config: ServiceConfig) -> Any:
    """The routes of `vllm serve`, with the policy's name and the section [openai] of the configuration: an ASGI
    application."""
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app

    args = openai_arguments(config.openai)
    args.model, args.served_model_name = config.served_name, [config.served_name]
    UNSENDABLE.apply_to(llm)
    if config.drafter.drafts and llm.vllm_config.device_config.device_type == "cpu":
        GRAMMARS.apply_to(llm)
    TOKEN_NAMES.ensure()
    app = build_app(args, ("generate",), llm.model_config)
    await init_app_state(llm, app.state, args, ("generate",))
    GENERATE_PARAMETERS.apply_to(app.state.serving_tokens)
    REQUIRED_PREFIX.apply_to(app.state.online_renderer, ends_of_turns(llm))
    # vLLM's exception handlers tell its web server to exit once the core is dead. Here the actor checks the core itself
    # (http_server.py).
    app.state.server = SimpleNamespace(should_exit=False)
    return RolloutRecords(app)


def ends_of_turns(llm: Any) -> set[int]:
    """The tokens with which a response ends, of the tokenizer and of the checkpoint's generation_config.json."""
    ids = llm.model_config.try_get_generation_config().get("eos_token_id") or []
    ends = {llm.renderer.get_eos_token_id(), *(ids if isinstance(ids, list) else [ids])}
    return ends - {None}


def openai_schemas() -> dict[str, dict[str, Any]]:
    """JSON schemas of the bodies of vLLM's own routes, by path. `properties` has every field that a body may have."""
    from pydantic import TypeAdapter
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest
    from vllm.entrypoints.serve.tokenize.protocol import DetokenizeRequest, TokenizeRequest

    bodies: dict[str, Any] = {
        "/v1/completions": CompletionRequest,
        "/v1/chat/completions": ChatCompletionRequest,
        "/inference/v1/generate": GenerateRequest,
        "/v1/completions/render": CompletionRequest,
        "/v1/chat/completions/render": ChatCompletionRequest,
        "/tokenize": TokenizeRequest,
        "/detokenize": DetokenizeRequest,
    }
    named = "#/components/schemas/vllm.{model}"  # in the service's document
    schemas = {path: TypeAdapter(body).json_schema(ref_template=named) for path, body in bodies.items()}
    schemas["/tokenize"] |= {"title": "TokenizeRequest", "properties": fields_of_any(schemas["/tokenize"])}
    for path, schema in schemas.items():
        own = [RETURN_RECORD] if path in RECORDED else []
        own += [REQUIRED_PREFIX_FIELD] if "messages" in schema["properties"] else []
        schema["properties"] |= {field: OWN_FIELDS[field] for field in own}
    return schemas


def fields_of_any(union: dict[str, Any]) -> dict[str, Any]:
    """The fields of all types of a union, with what the first type that has a field says about it."""
    kinds = [union["$defs"][part["$ref"].rpartition(".")[2]] for part in union["anyOf"]]
    return {name: field for kind in reversed(kinds) for name, field in kind["properties"].items()}
