"""Resources that the engines need from a machine or a cluster. Ray lets actors that it has no room for wait in silence.

- This machine does not grow, so too large a demand is refused before anything starts.
- A joined cluster may grow, and others may free what they use. So the fleet first asks it for room for all engines, and
  refuses to start when there is none within `ray_timeout` seconds. Ray's autoscaler sees what is asked for.
"""

import asyncio
import logging
from collections.abc import Sequence
from typing import Literal, NamedTuple

import ray
from ray.util import placement_group, remove_placement_group

from rollout_service.config import ServiceConfig
from rollout_service.engine.hardware import check_cpu_wheel, machine_cores
from rollout_service.fleet.member import FleetError

logger = logging.getLogger("rollout_service")

SOON = 2.0
"""seconds after which the log says what a cluster lacks; one that has room answers at once"""
WORDS = {"CPU": "core(s)", "GPU": "GPU(s)"}


class Demand(NamedTuple):
    """A number of engines, each of which needs an amount of one of Ray's resources on one node."""

    fields: str
    """fields of the configuration that decide it"""
    engines: int
    each: int
    resource: Literal["CPU", "GPU"]

    def __str__(self) -> str:
        word = WORDS[self.resource]
        return f"{self.fields}: {self.engines} engine(s) of {self.each} {word} each need {self.engines * self.each}"

    @property
    def advice(self) -> str:
        return f"lower {self.fields.replace(', ', ' or ')}"


def demands_of(config: ServiceConfig, device: str, cores: int | None = None) -> list[Demand]:
    """What a service needs. `cores`: what each engine on a CPU reserves, if that is known."""
    engine, count = config.engine, config.first_engines
    if device == "cuda":
        gpus = Demand("engines, engine.tensor_parallel_size", count, engine.tensor_parallel_size, "GPU")
        return [gpus, Demand("engines", count, 1, "CPU")]
    fields = "engines, engine.cores" if cores or engine.cores else "engines"
    return [Demand(fields, count, cores or engine.cores or 1, "CPU")]


def demands_in_turns(config: ServiceConfig, device: str, at_once: int) -> list[Demand]:
    """What a measurement needs that keeps `at_once` engines in memory. They take turns, so they share the cores."""
    if device == "cuda":
        fields = "engine.tensor_parallel_size" if at_once == 1 else "engines_at_once, engine.tensor_parallel_size"
        return [Demand(fields, at_once, config.engine.tensor_parallel_size, "GPU")]
    return [Demand("engine.cores", 1, config.engine.cores or 1, "CPU")]


def check_machine(config: ServiceConfig, device: str, turns: int | None = None) -> None:
    """Raises ValueError, with the fields and both numbers, when this machine has less than a service needs or, with
    `turns`, than a measurement needs that has so many engines at once. Raises it also for a field that has no effect on
    the device."""
    try:
        config.engine.check_device(device)
    except ValueError as error:
        raise ValueError(f"engine.{error}") from error
    if device == "cpu":
        check_cpu_wheel()
    machine: dict[str, float] = {"CPU": machine_cores(), "GPU": gpus() if device == "cuda" else 0}
    if device == "cuda" and not machine["GPU"]:
        raise ValueError("engine.device: is cuda, but torch finds no GPU on this machine; use auto or cpu")
    for demand in demands_in_turns(config, device, turns) if turns else demands_of(config, device):
        if missing := shortfall(demand, [machine]):
            raise ValueError(f"{missing} on this machine; {demand.advice}")


def gpus() -> int:
    import torch

    return torch.cuda.device_count()


def engines_that_fit(config: ServiceConfig, device: str) -> int:
    """How many engines can be in memory together and take turns: on a CPU any number, on GPUs those that have some."""
    return gpus() // config.engine.tensor_parallel_size if device == "cuda" else 1_000


def shortfall(demand: Demand, nodes: Sequence[dict[str, float]]) -> str | None:
    """What `nodes` lack, in words, or None if every engine finds a node. Each node has its amounts by resource."""
    amounts = [int(node.get(demand.resource, 0)) for node in nodes]
    if sum(amount // demand.each for amount in amounts) >= demand.engines:
        return None
    by_node = f" ({' + '.join(map(str, amounts))} by node)" if len(amounts) > 1 else ""
    return f"{demand}, but there are {sum(amounts)}{by_node}"


async def check_cluster(config: ServiceConfig, device: str, cores: int) -> None:
    """Wait until the joined cluster has room for all engines; on a CPU each reserves `cores`. Raises FleetError, with
    the fields and both numbers, when it has none within `ray_timeout` seconds.

    The room is asked for as a placement group, which is given back before the engines start: vLLM would use Ray among
    the GPUs of an engine that is in one. Another job may take the room in between. The engines then wait for it.
    """
    demands = demands_of(config, device, cores)
    room = placement_group([{demand.resource: demand.each for demand in demands}] * config.first_engines)
    ready = asyncio.ensure_future(room.ready())
    try:
        await asyncio.wait([ready], timeout=min(SOON, config.ray_timeout))
        if not ready.done():
            logger.warning("%s; waiting %d s for room", what_is_missing(demands), config.ray_timeout)
            await asyncio.wait([ready], timeout=max(0.0, config.ray_timeout - SOON))
        if not ready.done():
            raise FleetError(
                f"{what_is_missing(demands)}, also after {config.ray_timeout:.0f} s; {demands[0].advice}, or raise "
                "ray_timeout if the cluster grows"
            )
    finally:
        ready.cancel()
        remove_placement_group(room)


async def check_room_for_more(config: ServiceConfig, device: str, cores: int, running: int, more: int) -> None:
    """Raises FleetError when there is no room for `more` engines beside those that run. In a joined cluster they have
    `ray_timeout` seconds to find some."""
    if config.ray_address is not None:
        return await check_cluster(config.model_copy(update={"engines": more}), device, cores)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for demand in demands_of(config.model_copy(update={"engines": running + more}), device, cores):
        if missing := shortfall(demand, nodes):
            raise FleetError(f"{missing} on this machine; {demand.advice}")


def engines_that_fit_now(config: ServiceConfig, device: str, cores: int) -> int:
    """The number of further engines that the nodes have room for, beside whatever runs there."""
    each = demands_of(config.model_copy(update={"engines": 1}), device, cores)
    free = ray._private.state.available_resources_per_node().values()
    return sum(min(int(node.get(demand.resource, 0) // demand.each) for demand in each) for node in free)


def what_is_missing(demands: Sequence[Demand]) -> str:
    """What the joined cluster has too little of, or else, what others leave too little of."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for demand in demands:
        if missing := shortfall(demand, nodes):
            return f"{missing} in the cluster"
    free = ray.available_resources()
    scarcest = min(demands, key=lambda demand: free.get(demand.resource, 0) / (demand.engines * demand.each))
    return f"{scarcest}, but only {int(free.get(scarcest.resource, 0))} are free in the cluster"
