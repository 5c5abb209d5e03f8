"""Stage `actor`: the service's Engine without Ray, with vLLM's core in its own process."""

import asyncio
import sys
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

from common import DEVICE, MODELS, say
from configured import service_config
from updates import perturbed

from rollout_service.engine.engine import Engine
from rollout_service.engine.loading import WeightsFile
from rollout_service.protocol import Group, GroupRequest, Sampling
from rollout_service.tensor_bytes import file_checksum

NODE = "here"


def run() -> None:
    asyncio.run(serve())


async def serve() -> None:
    config = service_config("mtp", drafter={}, engine={"dtype": "bfloat16", "enforce_eager": False})
    engine = Engine(config.for_engine(), str(MODELS / "policy"), DEVICE, 0)
    started = await engine.start(None, None, None)
    milliseconds = [[round(1e3 * seconds, 2) for seconds in row] for row in started.costs.seconds]
    say("started; replaced", started.replaced)
    say("ms per step by draft length from 0 and batch size", started.costs.batch_sizes, milliseconds)
    say("schedule", (await engine.schedule()).ranges)

    began = time.monotonic()
    await asyncio.gather(*(engine.generate(request(i), f"first {i}") for i in range(32)))
    say(f"32 groups of 8 completions in {time.monotonic() - began:.2f} s")

    running = [asyncio.ensure_future(engine.generate(request(i), f"second {i}")) for i in range(16)]
    await asyncio.sleep(0.1)
    new = perturbed(MODELS / "policy") / "model.safetensors"
    with pretended_ray():
        weights = WeightsFile(1, str(new), file_checksum(new), NODE, None)
        say("new weights while the engine generates:", await engine.load(weights, of_drafter=False))
    groups: list[Group] = await asyncio.gather(*running)
    spans = [span for group in groups for c in group.completions for span in c.weight_versions]
    say("versions of the tokens:", {span.version for span in spans})

    await said("set_draft_sampling", engine.set_draft_sampling("greedy"))
    await said("set_draft_lengths", engine.set_draft_lengths([(1, 32, 1)]))
    await engine.stop()


def request(i: int) -> GroupRequest:
    sampling = Sampling(temperature=1.0, max_tokens=100, ignore_eos=True)
    return GroupRequest(id=str(i), prompt_token_ids=[5, 6, 7 + i], n=8, sampling=sampling)


@contextmanager
def pretended_ray() -> Iterator[None]:
    """A stand-in for Ray: `Engine.load` asks Ray for its node, and here is no cluster and perhaps no Ray."""
    real = sys.modules.get("ray")
    pretended = ModuleType("ray")
    pretended.get_runtime_context = lambda: SimpleNamespace(get_node_id=lambda: NODE)
    sys.modules["ray"] = pretended
    yield
    del sys.modules["ray"]
    if real:
        sys.modules["ray"] = real


async def said(name: str, call: Awaitable[None]) -> None:
    try:
        await call
        say(name, "ok")
    except Exception as error:
        say(name, "FAILED", type(error).__name__, str(error)[:200])
