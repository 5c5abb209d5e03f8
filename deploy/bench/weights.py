"""Item 5: the time of a push of the policy, from the learner's tensors to the first token of the new version.

It is compared with the least work of a push: copying the same bytes once, and packing the matrices for the kernels.
"""

import threading
import time
from pathlib import Path
from typing import Any

from bench_config import BenchConfig
from figures import Figure, figure
from processes import bare_engine, flags, launched
from rollout_speed import fixed_length

from drafters.files.checkpoint_folder import read_tensors
from drafters.kinds.mtp import is_mtp
from drafters.registry import DrafterConfig
from rollout_service.client import RolloutClient

GOAL = 2.0


def weights(config: BenchConfig) -> tuple[list[Figure], Any]:
    plan, served = config.weights, config.served(DrafterConfig())
    tensors = read_tensors(Path(config.policy), lambda name: not is_mtp(name))
    with bare_engine(served) as bare:
        floors = [bare.ask(pack=True) for _ in range(plan.rounds)]
    seconds, pauses = [], []
    with launched(*flags(served)) as url, RolloutClient(url) as client:
        running = Running(config, url)
        for version in range(1, 1 + plan.rounds):
            began = time.perf_counter()
            status = client.push_weights("policy", tensors, version=version)
            (group,) = client.rollouts(fixed_length(config, 1, 1))
            seconds.append(time.perf_counter() - began)
            pauses.append(status.pause)
            assert group.completions[0].weight_versions[-1].version == version
        running.stop()
    floor = sorted(f["copy"] + f["pack"] for f in floors)[len(floors) // 2]
    size = sum(t.numel() * t.element_size() for t in tensors.values()) / 2**20
    figures = [
        figure("weights", f"push of {size:.0f} MiB, relative to copying and packing it once", "x",
               [s / floor for s in seconds], goal=GOAL, at_least=False),
        figure("weights", "push to first token", "s", seconds),
        figure("weights", "pause of running sequences", "s", pauses),
        figure("weights", "copying once", "s", [f["copy"] for f in floors]),
        figure("weights", "packing once", "s", [f["pack"] for f in floors]),
    ]  # fmt: skip
    return figures, {"seconds": seconds, "pauses": pauses, "floors": floors}


class Running:
    """Keeps completions running until it is stopped."""

    def __init__(self, config: BenchConfig, url: str):
        self.stopping = False
        self.config, self.url = config, url
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        with RolloutClient(self.url) as client:
            while not self.stopping:
                list(client.rollouts(fixed_length(self.config, self.config.weights.running, 48)))

    def stop(self) -> None:
        self.stopping = True
        self.thread.join()
