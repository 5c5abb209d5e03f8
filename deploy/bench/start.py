"""Item 7: seconds from `rollout-service launch` to a ready service."""

import time
from typing import Any

from bench_config import BenchConfig
from figures import Figure, figure
from processes import launched

from rollout_service.client import RolloutClient

GOAL = 15.0


def start(config: BenchConfig) -> tuple[list[Figure], Any]:
    seconds = []
    for _ in range(config.start.rounds):
        began = time.perf_counter()
        with launched("--config", str(config.start.config)) as url:
            with RolloutClient(url) as client:
                assert client.ready()
            seconds.append(time.perf_counter() - began)
    return [figure("start", f"launch --config {config.start.config}", "s", seconds, goal=GOAL, at_least=False)], seconds
