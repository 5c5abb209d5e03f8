"""The HTTP front: the routes over one fleet, what guards them, and what their errors look like."""

import asyncio
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from rollout_service.fleet.fleet import Fleet
from rollout_service.http.admission import Admission
from rollout_service.http.errors import add_error_handlers
from rollout_service.http.guard import Guard
from rollout_service.http.openapi import describe
from rollout_service.http.routes import batches, openai, pausing, rollouts, server, status, updates, weights
from rollout_service.queue.background import BackgroundGeneration
from rollout_service.queue.batch_queue import BatchQueue
from rollout_service.telemetry import Telemetry


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of the policy in `folder`. Takes seconds, most of them to import transformers."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def make_app(fleet: Fleet, tokenizer: Any, queue: BatchQueue) -> FastAPI:
    """The application over a started fleet, with its policy's tokenizer and the queue of its groups."""
    config = fleet.config
    app = FastAPI(title="rollout-service", summary="RL rollouts with lossless speculative decoding", version="0.1.0")
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
        openai_fields={path: frozenset(schema["properties"]) for path, schema in fleet.openai_schemas.items()},
        on_cpu=fleet.device == "cpu",
    )
    app.state.background = BackgroundGeneration(fleet, queue, app.state.telemetry)
    for module in (rollouts, batches, weights, openai, status, pausing, updates, server):
        app.include_router(module.router)
    add_error_handlers(app)
    token = config.token.get_secret_value() if config.token else None
    describe(app, fleet, with_token=token is not None)
    app.add_middleware(Guard, token=token, body_limit=config.body_limit_mib << 20, stopping=app.state.stopping)
    return app
