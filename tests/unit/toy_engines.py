"""Toy engines: a fleet whose actors answer at once, and can be frozen and killed. No Ray is started."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace

from ray.exceptions import ActorUnavailableError

from rollout_service.config import ServiceConfig
from rollout_service.engine.engine import Started
from rollout_service.engine.loading import Loaded, WeightsFile
from rollout_service.fleet import engine_lives
from rollout_service.fleet.controls import Controls
from rollout_service.fleet.engine_lives import EngineLives
from rollout_service.fleet.fleet import Fleet
from rollout_service.fleet.pausing import Pausing
from rollout_service.fleet.pushes import Pushes
from rollout_service.fleet.scaling import Scaling
from rollout_service.protocol import Group, Sampling
from rollout_service.weights.versions import WeightSet


class Actor:
    """An engine that can be frozen: then no call of it ends. `ray.kill` makes it a new one, which was not started."""

    def __init__(self, index):
        self.index, self.lives, self.held, self.asked = index, 0, None, []
        self.slow = 0.0  # seconds that a group takes
        self.awake = asyncio.Event()
        self.awake.set()
        names = "start", "check", "load", "generate", "control", "metrics", "abort", "stop"
        self.__dict__ |= {name: SimpleNamespace(remote=self.call(getattr(self, f"_{name}"))) for name in names}

    def call(self, method):
        async def remote(*arguments):
            life = self.lives
            self.asked.append(method.__name__)
            await self.awake.wait()
            if life != self.lives:
                raise ActorUnavailableError("killed", None)
            return await method(*arguments)

        return remote

    def freeze(self):
        self.awake.clear()

    def wake(self):
        self.awake.set()

    def kill(self):
        self.lives, self.held = self.lives + 1, None
        self.wake()

    async def _start(self, costs):
        await asyncio.sleep(0.1)
        return Started({}, None, {}, "/socket", f"node {self.index}")

    async def _check(self): ...

    async def _abort(self, key): ...

    async def _stop(self): ...

    async def _load(self, weights, of_drafter):
        self.held = weights.version
        return Loaded(pause=0.1, changed=1, modules=1)

    async def _generate(self, group, key):
        await asyncio.sleep(0.01 + self.slow)
        await self.awake.wait()
        return Group(id=group.id, prompt_token_ids=[1], completions=[], sampling=Sampling(), engine=self.index)

    async def _control(self, *call):
        return True

    async def _metrics(self):
        return "text"


@asynccontextmanager
async def toy_fleet(monkeypatch, folder, engines=2, timeout=0.4) -> AsyncIterator[Fleet]:
    """A fleet of engines in service, which are watched. `folder` is the service's."""
    monkeypatch.setattr("ray.kill", lambda actor, no_restart: actor.kill())
    monkeypatch.setattr(engine_lives, "AGAIN_AFTER", 0.01)
    monkeypatch.setattr("rollout_service.weights.versions.tensor_specs", lambda file: {})
    monkeypatch.setattr("ray.put", lambda array: f"{len(array)} bytes")
    monkeypatch.setattr(
        "rollout_service.fleet.pushes.locate",
        lambda version, update, *_: WeightsFile(version, str(update.file), update.checksum, "here", None),
    )
    made = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *given: Actor(given[3])))
    monkeypatch.setattr("ray.remote", lambda _: made)
    fleet = Fleet.__new__(Fleet)
    EngineLives.__init__(fleet)
    config = ServiceConfig(model="demo", engines=engines, engine={"device": "cpu", "cores": 1})
    fleet.config = config.model_copy(update={"engine_timeout": timeout})
    fleet.device, fleet.folder, fleet.key, fleet.threads, fleet.reserved_cores = "cpu", folder, "the key", 1, 1
    fleet.store = SimpleNamespace(
        sets={"policy": WeightSet("policy", {}, "float32")}, version=lambda of: 0, differs=lambda *_: True,
        folder=SimpleNamespace(path=folder),
    )  # fmt: skip
    alarms = SimpleNamespace(after_push=lambda *_, **more: None)
    fleet.pushes = Pushes(fleet.store, None, alarms, fleet.members)
    fleet.controls = Controls(fleet.members)
    fleet.pausing = Pausing(fleet.controls, fleet.pushes.lock, frees_memory=False)
    fleet.scaling = Scaling(fleet)
    for _ in range(engines):
        fleet.make_engine()
    await fleet.start_engines(fleet.members)
    yield fleet
    fleet.scaling.stop()
    for watch in fleet._watches.values():
        watch.cancel()


async def until(condition, within=3.0):
    async with asyncio.timeout(within):
        while not condition():
            await asyncio.sleep(0.005)
