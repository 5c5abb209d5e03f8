"""vLLM's own OpenAI-compatible application over an engine of ours, inside the engine's actor."""

from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI

from rollout_service.config import ServiceConfig
from rollout_service.engine.openai_arguments import openai_arguments
from rollout_service.vllm_plugin.grammars import GRAMMARS
from rollout_service.vllm_plugin.unsendable import UNSENDABLE


async def openai_app(llm: Any, config: ServiceConfig) -> FastAPI:
    """The routes of `vllm serve`, with the policy's name and the section [openai] of the configuration."""
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app

    args = openai_arguments(config.openai)
    args.model, args.served_model_name = config.served_name, [config.served_name]
    UNSENDABLE.apply_to(llm)
    if config.drafter.drafts and llm.vllm_config.device_config.device_type == "cpu":
        GRAMMARS.apply_to(llm)
    app = build_app(args, ("generate",), llm.model_config)
    await init_app_state(llm, app.state, args, ("generate",))
    # vLLM's exception handlers tell its web server to exit once the core is dead. Here the actor checks the core itself
    # (`Engine.openai`).
    app.state.server = SimpleNamespace(should_exit=False)
    return app


def openai_schemas() -> dict[str, dict[str, Any]]:
    """JSON schemas of the bodies of vLLM's own routes, by path."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    bodies: dict[str, Any] = {"/v1/completions": CompletionRequest, "/v1/chat/completions": ChatCompletionRequest}
    named = "#/components/schemas/vllm.{model}"  # in the service's document
    return {path: body.model_json_schema(ref_template=named) for path, body in bodies.items()}
