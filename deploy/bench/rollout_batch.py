"""Item 2: the time of a long-tailed rollout batch, as in RL, with the default schedule and without a drafter."""

import asyncio
import time
from typing import Any

import numpy as np
import ray
from bench_config import BenchConfig
from figures import Figure, figure
from rollout_speed import fixed_length, tokens

from drafters.registry import DrafterConfig
from rollout_service.evaluation.arms import EngineArm
from rollout_service.evaluation.running import generate_all, progress, report_console, started_engines

GOAL = 1.8


def rollout_batch(config: BenchConfig) -> tuple[list[Figure], Any]:
    figures, details = [], {}
    try:
        for kind in config.drafters:
            seconds, more = asyncio.run(_measure(config, kind))
            ratios = [a / b for a, b in zip(seconds["none"], seconds["with"], strict=True)]
            what = f"{kind}, {config.rollout_batch.completions} completions in {config.rollout_batch.slots} slots"
            figures.append(figure("rollout_batch", what, "x", ratios, goal=GOAL))
            details[kind] = {"seconds": seconds, **more}
    finally:
        ray.shutdown()
    return figures, details


def long_tailed(config: BenchConfig) -> list[int]:
    """Log-normal lengths, the same in every run."""
    plan, draw = config.rollout_batch, np.random.default_rng(0)
    lengths = draw.lognormal(np.log(plan.median_tokens), plan.sigma, plan.completions)
    return [int(length) for length in lengths.clip(4, plan.longest)]


async def _measure(config: BenchConfig, kind: str) -> tuple[dict[str, list[float]], dict[str, Any]]:
    plan = config.rollout_batch
    requests = fixed_length(config, plan.completions, long_tailed(config))
    arms = {
        "none": EngineArm(config.served(DrafterConfig(), max_num_seqs=plan.slots)),
        "with": EngineArm(config.served(config.drafter(kind), max_num_seqs=plan.slots)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    with progress(report_console()) as bar:
        async with started_engines(list(arms.values()), bar):
            task = bar.add_task(kind, total=(1 + plan.rounds) * len(arms))
            for round in range(1 + plan.rounds):
                for name, arm in arms.items():
                    began = time.perf_counter()
                    groups = await generate_all(arm, requests, len(requests), lambda: None)
                    if round > 0:  # the first round warms up
                        seconds[name].append(time.perf_counter() - began)
                    bar.advance(task)
            schedule = (await arms["with"].fleet.schedules())[0]
    return seconds, {"tokens": tokens(groups), "schedule": schedule.model_dump(mode="json")}
