"""The HTTP front over a toy fleet, for tests: every route and check is real, and engines answer at once."""

import asyncio
import json
from contextlib import asynccontextmanager
from types import SimpleNamespace

import httpx

from rollout_service.config import ServiceConfig
from rollout_service.fleet.alarms import Alarms
from rollout_service.fleet.engine_http import Answer
from rollout_service.fleet.member import HungUp
from rollout_service.http.app import make_app
from rollout_service.protocol import Completion, FleetStatus, Group, WeightSpan, WeightStatus
from rollout_service.queue.batch_queue import BatchQueue

FIELDS = ("model", "prompt", "messages", "max_tokens", "temperature", "top_k", "top_p", "n", "seed", "stop", "stream")
SCHEMA = {"title": "Request", "type": "object", "properties": {name: {} for name in FIELDS}}
GENERATES = SCHEMA | {"properties": SCHEMA["properties"] | {"return_rollout_record": {}}}
PARAMETERS = {"type": "object", "properties": {name: {} for name in ("n", "temperature", "top_k", "min_p", "seed")}}
GENERATE = {
    "title": "GenerateRequest", "type": "object",
    "properties": {"token_ids": {}, "sampling_params": PARAMETERS, "return_rollout_record": {}, "stream": {}},
}  # fmt: skip


class Characters:
    """A tokenizer with one token per character. Its chat template refuses the system role."""

    def encode(self, text, add_special_tokens=True):
        return [ord(c) % 128 for c in text]

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        if any(message["role"] == "system" for message in messages):
            raise ValueError("System role not supported")
        return "".join(f"{m['role']}:{m['content']}\n" for m in messages)


class StubFleet:
    """What the front uses of a fleet. `outcomes`: by group id, an exception to raise or the seconds to take."""

    def __init__(self, **config):
        self.config = ServiceConfig(model="demo", engine={"max_model_len": 64}, **config)
        self.device, self.state, self.members, self.wasted_tokens = "cpu", None, [], 0
        self.policy_config = {"vocab_size": 128}
        self.openai_schemas = {
            "/v1/completions": GENERATES, "/v1/chat/completions": GENERATES, "/inference/v1/generate": GENERATE,
            "/v1/completions/render": SCHEMA, "/v1/chat/completions/render": SCHEMA, "/tokenize": SCHEMA,
            "/detokenize": SCHEMA,
        }  # fmt: skip
        self.alarms = Alarms(self.config.alarms)
        status = WeightStatus(version=0, tensors=1, bytes=0, checksum="")
        sets = {"policy": SimpleNamespace(status=status, dtype="float32")}
        self.store = SimpleNamespace(sets=sets, folder=SimpleNamespace(path="/none"), version=lambda of: 0)
        self.pushes = SimpleNamespace(on_published=None, drafter_since={})
        self.pausing = SimpleNamespace(paused=False)
        self.scaling = SimpleNamespace(status=lambda: FleetStatus(wanted=1, engines=[]))
        self.outcomes, self.begun, self.ended, self.asked = {}, [], [], []
        self.hung_up = asyncio.Event()

    async def generate(self, group):
        self.begun.append(group.id)
        try:
            outcome = self.outcomes.get(group.id, 0)
            if isinstance(outcome, Exception):
                raise outcome
            await asyncio.sleep(outcome)
        finally:
            self.ended.append(group.id)
        spans = [WeightSpan(version=0, start=0, end=1)]
        completion = Completion(
            index=0, text="a", token_ids=[1], logprobs=[-1.0], finish_reason="stop", weight_versions=spans
        )
        prompt = group.prompt_token_ids
        return Group(id=group.id, prompt_token_ids=prompt, completions=[completion], sampling=group.sampling, engine=0)

    async def openai(self, method, path, headers, body, session=None, tokens=1):
        """The answer to the prompt `slow` does not end before the service hangs up; as a stream it at least begins."""
        self.asked.append(SimpleNamespace(path=path, headers=headers, body=body, session=session, tokens=tokens))
        fields = json.loads(body)
        slow, stream = fields.get("prompt") == "slow", fields.get("stream")

        async def events():
            yield b"data: {}\n\n"
            if slow:
                await self.wait(body)

        if stream:
            return Answer(200, {"content-type": "text/event-stream"}, events())
        if slow:
            await self.wait(body)
        return Answer(200, {"content-type": "application/json"}, b"{}")

    async def wait(self, body):
        try:
            await self.hung_up.wait()
            raise HungUp("the service is stopping")
        finally:
            self.ended.append(body)

    async def hang_up(self):
        self.hung_up.set()

    async def check_acceptance(self): ...

    async def ready(self):
        return True

    async def metrics(self):
        return {}

    async def speculation(self):
        return []

    async def context_acceptance(self):
        return []

    async def running(self):
        return {}

    async def schedules(self):
        return []


@asynccontextmanager
async def front(fleet):
    """Yields a client of the front's routes, and the application."""
    queue = BatchQueue(None, capacity=4096, disk_mib=64)
    app = make_app(fleet, Characters(), queue)
    app.state.background.start()
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            yield client, app
    finally:
        await app.state.background.stop()
        queue.close()
