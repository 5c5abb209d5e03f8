"""Stage `actor`: the service's fleet and its engine's actor, with vLLM's core in its own process."""

import asyncio
import time
from collections.abc import Awaitable

from common import MODELS, say
from configured import service_config
from updates import perturbed

from rollout_service.fleet.fleet import Fleet
from rollout_service.protocol import Group, GroupRequest, Sampling


def run() -> None:
    asyncio.run(serve())


async def serve() -> None:
    config = service_config("mtp", drafter={}, engine={"dtype": "bfloat16", "enforce_eager": False})
    fleet = Fleet(config)
    await fleet.start()
    costs = fleet.members[0].costs
    assert costs is not None
    milliseconds = [[round(1e3 * seconds, 2) for seconds in row] for row in costs.seconds]
    say("ms per step by draft length from 0 and batch size", costs.batch_sizes, milliseconds)
    say("schedule", (await fleet.schedules())[0].ranges)

    began = time.monotonic()
    await asyncio.gather(*(fleet.generate(request(i)) for i in range(32)))
    say(f"32 groups of 8 completions in {time.monotonic() - began:.2f} s")

    running = [asyncio.ensure_future(fleet.generate(request(i))) for i in range(16)]
    await asyncio.sleep(0.1)
    pushed = await fleet.updates.push_folder("policy", str(perturbed(MODELS / "policy")))
    say("new weights while the engine generates:", f"{pushed.status.seconds:.2f} s, pause {pushed.status.pause:.2f} s")
    groups: list[Group] = await asyncio.gather(*running)
    spans = [span for group in groups for c in group.completions for span in c.weight_versions]
    say("versions of the tokens:", {span.version for span in spans})

    await said("set_draft_sampling", fleet.set_draft_sampling("greedy"))
    await said("set_draft_lengths", fleet.set_draft_lengths([(1, 32, 1)]))
    await fleet.stop()


def request(i: int) -> GroupRequest:
    sampling = Sampling(temperature=1.0, max_tokens=100, ignore_eos=True)
    return GroupRequest(id=str(i), prompt_token_ids=[5, 6, 7 + i], n=8, sampling=sampling)


async def said(name: str, call: Awaitable[None]) -> None:
    try:
        await call
        say(name, "ok")
    except Exception as error:
        say(name, "FAILED", type(error).__name__, str(error)[:200])
