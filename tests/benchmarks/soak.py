"""Soak test with stub engines: memory, disk and time per request must not grow with the number of groups.

    python tests/benchmarks/soak.py [--groups 1000000] [--versions 10000] [--engines 4] [--folder FOLDER]

Everything between the client and the engines is real: HTTP routes, queue, background generation, fleet, pushes, alarms
and speculation counts. Between two pushes of the policy, a trainer sends prompts, leases groups and acknowledges them.
After every second one, the drafter is pushed too. The script prints one line per interval, and exits with 1 if
something grew.
"""

import argparse
import asyncio
import logging
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import httpx
import psutil
from fastapi import FastAPI
from safetensors.numpy import save_file

from rollout_service.client import AsyncRolloutClient
from rollout_service.config import ServiceConfig
from rollout_service.engine.loading import Loaded, Versions, WeightsFile
from rollout_service.engine.speculation_stats import SpeculationCounts
from rollout_service.fleet import pushes
from rollout_service.fleet.alarms import Alarms
from rollout_service.fleet.controls import Controls
from rollout_service.fleet.engine_lives import EngineLives
from rollout_service.fleet.fleet import Fleet
from rollout_service.fleet.member import Member
from rollout_service.fleet.pausing import Pausing
from rollout_service.fleet.scaling import Scaling
from rollout_service.http.app import add_error_handlers
from rollout_service.http.routes import batches, status
from rollout_service.protocol import Completion, DraftSchedule, Group, GroupRequest, LeaseRequest, PromptsRequest
from rollout_service.protocol import WeightSpan as Span
from rollout_service.queue.background import BackgroundGeneration
from rollout_service.queue.batch_queue import BatchQueue
from rollout_service.telemetry import Telemetry
from rollout_service.transports import Update
from rollout_service.weights.versions import WeightSet

INTERVALS = 20
GETS_EVERY = 5
"""rounds between two requests to the status routes"""
PATHS = ("/v1/batches", "/v1/speculation", "/metrics")
MAY_GROW = {"memory": (1.05, 8.0), "disk": (1.05, 1.0), "time": (1.5, 0.001)}
"""allowed growth from the second quarter to the last: a factor, and a number of MiB or seconds"""


class Sample(NamedTuple):
    """One interval: MiB at its end, and the median seconds of each kind of request in it."""

    groups: int
    memory: float
    disk: float
    seconds: dict[str, float]


class StubEngine:
    """An actor whose methods take no time. Its acceptance rate falls and rises with the versions."""

    def __init__(self, index: int):
        self.index, self.versions = index, Versions(0, 0)
        self.counts = SpeculationCounts(lambda: self.versions)
        names = ("generate", "load", "speculation", "context_acceptance", "schedule", "running", "metrics")
        self.__dict__ |= {name: SimpleNamespace(remote=getattr(self, f"_{name}")) for name in names}

    async def _generate(self, group: GroupRequest, key: str) -> Group:
        await asyncio.sleep(0.0)  # other groups begin meanwhile, so that every engine has some
        policy = self.versions.policy
        drafts = SimpleNamespace(
            num_drafts=100, num_draft_tokens=300, num_accepted_tokens=100 + policy % 2 * 100,
            num_accepted_tokens_per_pos=[50 + policy % 2 * 40, 30, 20],
        )  # fmt: skip
        self.counts.record(SimpleNamespace(spec_decoding_stats=drafts), None)
        completion = Completion(
            index=0, text="a", token_ids=[1, 2], logprobs=[-1.0, -1.0], finish_reason="stop",
            weight_versions=[Span(version=policy, start=0, end=2)],
        )  # fmt: skip
        return Group(
            id=str(group.id), prompt_token_ids=[1], completions=[completion], sampling=group.sampling, engine=self.index
        )

    async def _load(self, weights: WeightsFile, of_drafter: bool) -> Loaded:
        self.versions = self.versions._replace(**{"drafter" if of_drafter else "policy": weights.version})
        return Loaded(pause=0.0, changed=1, modules=1)

    async def _speculation(self) -> list[dict[str, Any]]:
        return self.counts.rows()

    async def _context_acceptance(self) -> dict[int, list[int]]:
        return {}

    async def _schedule(self) -> DraftSchedule:
        return DraftSchedule(engine=self.index, source="fixed", ranges=[(1, 8, 3)], reason="a stub")

    async def _running(self) -> dict[str, str]:
        return {}

    async def _metrics(self) -> str:
        return ""


def stub_fleet(engines: int) -> Fleet:
    """A fleet without Ray, models or files."""
    fleet = object.__new__(Fleet)
    EngineLives.__init__(fleet)
    fleet.config = ServiceConfig.model_validate({"model": "stub", "engines": engines, "drafter": {"kind": "mtp"}})
    fleet.device, fleet.reserved_cores = "cpu", 1
    fleet.alarms = Alarms(fleet.config.alarms)
    fleet.members += [Member(i, StubEngine(i), in_service=True) for i in range(engines)]
    sets = {of: WeightSet(of, {}, "float32") for of in ("policy", "drafter")}
    fleet.store = SimpleNamespace(sets=sets, version=lambda of: sets[of].status.version, differs=lambda *_: True)
    fleet.pushes = pushes.Pushes(fleet.store, None, fleet.alarms, fleet.members)
    fleet.pausing = Pausing(Controls(fleet.members), fleet.pushes.lock, frees_memory=False)
    fleet.scaling = Scaling(fleet)
    return fleet


class Soak:
    def __init__(self, folder: Path, engines: int):
        self.folder, self.fleet, self.file = folder, stub_fleet(engines), folder / "queue.sqlite"
        pushes.locate = lambda version, update, *_: WeightsFile(
            version, str(update.file), update.checksum, "here", None
        )
        self.app, telemetry = FastAPI(), Telemetry()
        self.queue = BatchQueue(self.file, capacity=4096, disk_mib=4096)
        self.app.state.background = BackgroundGeneration(self.fleet, self.queue, telemetry)
        self.app.state.fleet, self.app.state.telemetry = self.fleet, telemetry
        self.app.state.admission = SimpleNamespace(admit=lambda request: request.groups)
        for module in (batches, status):
            self.app.include_router(module.router)
        add_error_handlers(self.app)
        self.seconds: dict[str, list[float]] = defaultdict(list)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[AsyncRolloutClient]:
        self.app.state.background.start()
        async with AsyncRolloutClient("http://soak") as client:
            client.http = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://soak")
            yield client
        await self.app.state.background.stop()
        self.queue.close()

    async def timed(self, name: str, answer: Awaitable[Any]) -> Any:
        began = time.perf_counter()
        result = await answer
        self.seconds[name].append(time.perf_counter() - began)
        return result

    async def run(self, groups: int, versions: int) -> list[Sample]:
        samples, size = [], max(1, groups // versions)
        async with self.client() as client:
            for version in range(1, versions + 1):
                await self.round(client, version, size)
                if version % GETS_EVERY == 0:
                    for path in PATHS:
                        assert (await self.timed(path, client.http.get(path))).status_code == 200
                if version % max(1, versions // INTERVALS) == 0:
                    samples.append(self.sample(version * size))
        return samples

    async def round(self, client: AsyncRolloutClient, version: int, size: int) -> None:
        requests = [GroupRequest(id=f"train-{version * size + i:09d}", prompt_token_ids=[1]) for i in range(size)]
        await self.timed("send", client.send_prompts(PromptsRequest(groups=requests, run="f" * 32)))
        while self.queue.status().finished < size:
            await asyncio.sleep(0.001)
        batch = await self.timed("lease", client.lease(LeaseRequest(groups=size, run="f" * 32)))
        assert len(batch.groups) == size
        await self.timed("ack", client.acknowledge(batch.lease))
        for of in ("policy", "drafter") if version % 2 == 0 else ("policy",):
            file = self.folder / f"{of}-{version}.safetensors"
            save_file({}, file)
            await self.timed("push", self.fleet.pushes.push(of, version, Update(file, f"{version:064x}")))

    def sample(self, groups: int) -> Sample:
        memory = psutil.Process().memory_info().rss
        disk = sum(file.stat().st_size for file in self.folder.iterdir())
        seconds = {name: statistics.median(values) for name, values in self.seconds.items()}
        self.seconds.clear()
        sample = Sample(groups, memory / 2**20, disk / 2**20, seconds)
        times = "  ".join(f"{name} {1e3 * value:.2f}" for name, value in seconds.items())
        print(
            f"{groups:9d} groups  {sample.memory:.1f} MiB memory  {sample.disk:.1f} MiB disk  ms: {times}", flush=True
        )
        return sample


def growth(samples: list[Sample]) -> list[str]:
    """Whatever grew by more than MAY_GROW from the second quarter to the last."""
    quarter = len(samples) // 4
    before, after = samples[quarter : 2 * quarter], samples[-quarter:]
    series = {
        "memory": (MAY_GROW["memory"], [[s.memory for s in part] for part in (before, after)]),
        "disk": (MAY_GROW["disk"], [[s.disk for s in part] for part in (before, after)]),
        **{name: (MAY_GROW["time"], [[s.seconds[name] for s in part] for part in (before, after)])
           for name in samples[0].seconds},
    }  # fmt: skip
    found = []
    for name, ((factor, more), parts) in series.items():
        first, last = (statistics.median(part) for part in parts)
        if last > factor * first + more:
            found.append(f"{name} grew from {first:.4g} to {last:.4g}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=1_000_000)
    parser.add_argument("--versions", type=int, default=10_000)
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="of the queue's database; a temporary one when not given")
    chosen = parser.parse_args()
    logging.getLogger("rollout_service").setLevel(logging.CRITICAL)  # the stubs' acceptance keeps raising alarms
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        samples = asyncio.run(Soak(Path(folder), chosen.engines).run(chosen.groups, chosen.versions))
    found = growth(samples)
    print(f"{time.monotonic() - began:.0f} s; " + ("; ".join(found) or "nothing grew"))
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
