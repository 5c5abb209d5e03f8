"""Resources that the engines need from a machine or a cluster. Ray lets actors that it has no room for wait in silence.

- This machine does not grow, so too large a demand is refused before anything starts.
- A cluster may grow, or others may free what they use. So the fleet waits for it, and says what is missing.
"""

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import ray

from rollout_service.config import ServiceConfig
from rollout_service.engine.hardware import machine_cores

logger = logging.getLogger("rollout_service")

LOOK_EVERY = 5.0
"""seconds between checks of a cluster that has too little"""
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


def demand_of(config: ServiceConfig, device: str, turns: int | None = None) -> Demand:
    """What a service needs. With `turns`, what that many engines need that take turns on the same cores."""
    engine = config.engine
    if device == "cuda":
        fields = "engine.tensor_parallel_size" if turns else "engines, engine.tensor_parallel_size"
        return Demand(fields, turns or config.engines, engine.tensor_parallel_size, "GPU")
    if turns:
        return Demand("engine.cores", 1, engine.cores or 1, "CPU")
    return Demand("engines, engine.cores" if engine.cores else "engines", config.engines, engine.cores or 1, "CPU")


def check_machine(config: ServiceConfig, device: str, turns: int | None = None) -> None:
    """Raises ValueError, with the fields and both numbers, when this machine has less than is needed. Raises it also
    for a field that has no effect on the device."""
    try:
        config.engine.check_device(device)
    except ValueError as error:
        raise ValueError(f"engine.{error}") from error
    machine: dict[str, float] = {"CPU": machine_cores(), "GPU": gpus() if device == "cuda" else 0}
    if device == "cuda" and not machine["GPU"]:
        raise ValueError("engine.device: is cuda, but torch finds no GPU on this machine; use auto or cpu")
    missing = shortfall(demand_of(config, device, turns), [machine])
    if missing:
        raise ValueError(f"{missing} on this machine")


def gpus() -> int:
    import torch

    return torch.cuda.device_count()


def shortfall(demand: Demand, nodes: Sequence[dict[str, float]]) -> str | None:
    """What `nodes` lack, in words, or None if every engine finds a node. Each node has its amounts by resource."""
    amounts = [int(node.get(demand.resource, 0)) for node in nodes]
    if sum(amount // demand.each for amount in amounts) >= demand.engines:
        return None
    by_node = f" ({' + '.join(map(str, amounts))} by node)" if len(amounts) > 1 else ""
    return f"{demand}, but there are {sum(amounts)}{by_node}"


@contextmanager
def missing_is_said(config: ServiceConfig, device: str) -> Iterator[None]:
    """A context around the start of the engines in a cluster: log lines say what they wait for."""
    if config.ray_address is None:
        yield
        return
    demand = demand_of(config, device)
    free = int(ray.available_resources().get(demand.resource, 0))
    if free < demand.engines * demand.each:
        logger.warning("%s, but only %d are free in the cluster at present", demand, free)
    watch = asyncio.create_task(say_what_is_missing(demand))
    try:
        yield
    finally:
        watch.cancel()


async def say_what_is_missing(demand: Demand) -> None:
    """Until it is cancelled, write a log line whenever the cluster has too little and the amount has changed."""
    said = None
    while True:
        missing = shortfall(demand, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        if missing is not None and missing != said:
            logger.warning("%s in the cluster; waiting for it to grow", missing)
        said = missing
        await asyncio.sleep(LOOK_EVERY)
