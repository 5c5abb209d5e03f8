"""The HTTP front: the routes over one fleet, what guards them, and what their errors look like."""

import asyncio
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp

from rollout_service.config import ServiceConfig
from rollout_service.fleet.fleet import Fleet
from rollout_service.http.admission import Admission
from rollout_service.http.errors import add_error_handlers
from rollout_service.http.guard import Guard
from rollout_service.http.openai_requests import body_fields
from rollout_service.http.openapi import describe
from rollout_service.http.outermost import outermost
from rollout_service.http.routes import MODULES
from rollout_service.http.routes.probes import VERSION
from rollout_service.http.tokens import Tokens
from rollout_service.queue.background import BackgroundGeneration
from rollout_service.queue.batch_queue import BatchQueue
from rollout_service.telemetry import Telemetry


def load_tokenizer(folder: Path, chat_template: str | None = None) -> Any:
    """The tokenizer of the policy in `folder`, with this chat template if one is given. Takes seconds, most of them to
    import transformers."""
    from transformers import AutoTokenizer

    import drafters.latent_moe  # noqa: F401

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def make_app(fleet: Fleet, tokenizer: Any, queue: BatchQueue) -> FastAPI:
    """The application over a started fleet, with its policy's tokenizer and the queue of its groups."""
    config = fleet.config
    app = FastAPI(title="rollout-service", summary="RL rollouts with lossless speculative decoding", version=VERSION)
    app.state.fleet = fleet
    app.state.telemetry = telemetry = Telemetry()
    app.state.stopping = asyncio.Event()  # set when the service is told to stop
    fleet.alarms.on_alarm = lambda kind: telemetry.alarms.labels(kind).inc()
    app.state.admission = Admission(
        config.served_name,
        tokenizer,
        vocab_size=fleet.policy_config["vocab_size"],
        context_limit=config.context_limit,
        drafting=config.drafter.drafts,
        openai_fields={path: body_fields(schema) for path, schema in fleet.openai_schemas.items()},
        on_cpu=fleet.device == "cpu",
        chat_template_kwargs=config.openai.chat_template_kwargs,
        routed_experts=config.engine.routed_experts,
    )
    app.state.background = BackgroundGeneration(fleet, queue, app.state.telemetry)
    for module in MODULES:
        app.include_router(module.router)
    add_error_handlers(app)
    describe(app, fleet, with_token=config.token is not None)
    limit = config.body_limit_mib << 20
    app.add_middleware(
        Guard,
        tokens=Tokens(config),
        body_limit=limit,
        stopping=app.state.stopping,
        origins=config.cors.origins,
    )
    wrap(app, config)
    return app


async def stop(app: FastAPI) -> None:
    """Let the requests under way tell their clients that the service stops, and end. Later ones are refused."""
    app.state.stopping.set()
    await app.state.fleet.hang_up()


def wrap(app: FastAPI, config: ServiceConfig) -> None:
    """Put `outermost` around all of the application, once its first request builds it."""
    build = app.build_middleware_stack

    def whole() -> ASGIApp:
        return outermost(build(), config)

    app.build_middleware_stack = whole  # type: ignore[method-assign]
