"""Item 1: tokens per second relative to no drafter, by streams, with a fixed draft length and the calibrated schedule.

For each drafter, two engines run side by side: one without and one with the drafter. They are calibrated first. Then,
in each round and for each number of streams, every arm generates responses of one length to the same prompts. The
policy's own responses to these prompts are at least as long. The table shows the calibration's prediction beside the
measurement.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import ray
from bench_config import BenchConfig
from figures import Figure, figure

from drafters.registry import DrafterConfig
from drafters.schedule import Calibration, Range
from rollout_service.evaluation.arms import EngineArm
from rollout_service.evaluation.calibrate import choose, measure_in_turns, table
from rollout_service.evaluation.calibrate_config import CalibrateConfig
from rollout_service.evaluation.prompts import read_prompts
from rollout_service.evaluation.running import generate_all, progress, report_console, started_engines
from rollout_service.protocol import Group, GroupRequest, Sampling

GOALS = {1: 2.5, 4: 2.0, 16: 1.5}
NEVER_BELOW = 0.98


def rollout_speed(config: BenchConfig) -> tuple[list[Figure], Any]:
    figures: list[Figure] = []
    details = {}
    try:
        for kind in config.drafters:
            calibration, speeds = asyncio.run(_measure(config, kind))
            figures += _figures(config, kind, calibration, speeds)
            details[kind] = {"calibration": calibration.model_dump(mode="json"), "tokens_per_second": speeds}
    finally:
        ray.shutdown()
    return figures, details


async def _measure(config: BenchConfig, kind: str) -> tuple[Calibration, dict[str, dict[int, list[float]]]]:
    """The calibration, and the tokens per second of each arm by streams, one value for each round."""
    plan, console = config.rollout_speed, report_console()
    calibrate = CalibrateConfig(
        model=config.policy,
        engine=config.engine,
        drafter=config.drafter(kind),
        prompts=config.prompts,
        batch_sizes=plan.streams,
        rounds=plan.calibration_rounds,
        responses=64,
        response_tokens=plan.response_tokens,
        responses_per_stream=plan.responses_per_stream,
    )
    without = EngineArm(config.served(DrafterConfig()))
    with_it = EngineArm(config.served(calibrate.measured_drafter()))
    with progress(console) as bar:
        async with started_engines([without, with_it], bar):
            calibration = choose(calibrate, await measure_in_turns(calibrate, without, with_it, bar))
            console.print(table(calibration))
            prompts = await long_answered(config, without, plan.response_tokens)
            arms: dict[str, tuple[EngineArm, list[Range] | None]] = {
                "none": (without, None),
                f"k = {plan.fixed}": (with_it, [(1, config.engine.max_num_seqs, plan.fixed)]),
                "calibrated": (with_it, calibration.ranges),
            }
            speeds: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
            task = bar.add_task(kind, total=plan.rounds * len(plan.streams) * len(arms))
            for round in range(plan.rounds):
                # The arm before may affect the next one, so every second round has the opposite order.
                in_turn = list(arms.items())[:: -1 if round % 2 else 1]
                for streams in plan.streams:
                    count = max(streams * plan.responses_per_stream, plan.responses)
                    requests = fixed_length(config, count, plan.response_tokens, prompts, first=round * count)
                    for name, (arm, ranges) in in_turn:
                        if ranges is not None:
                            await arm.fleet.set_draft_lengths(ranges)
                        began = time.perf_counter()
                        groups = await generate_all(arm, requests, streams, lambda: None)
                        speeds[name][streams].append(tokens(groups) / (time.perf_counter() - began))
                        bar.advance(task)
    return calibration, {name: dict(of) for name, of in speeds.items()}


async def long_answered(config: BenchConfig, arm: EngineArm, response_tokens: int) -> list[list[int]]:
    """Prompts whose response, sampled once, has at least `response_tokens` tokens.

    A policy that must go on past the end of its response leaves what it has learned, and its drafters do too.
    """
    sampling = Sampling(temperature=1.0, max_tokens=response_tokens, seed=0)
    every = [GroupRequest(prompt_token_ids=p, sampling=sampling) for p in read_prompts(config.policy, config.prompts)]
    groups = await generate_all(arm, every, config.engine.max_num_seqs, lambda: None)
    return [group.prompt_token_ids for group in groups if group.completions[0].finish_reason == "length"]


def fixed_length(
    config: BenchConfig,
    count: int,
    response_tokens: int | Sequence[int],
    prompts: Sequence[list[int]] | None = None,
    first: int = 0,
) -> list[GroupRequest]:
    """`count` requests of one completion each, with these lengths. They cycle through the prompts from `first` on."""
    lengths = [response_tokens] * count if isinstance(response_tokens, int) else response_tokens
    prompts = prompts or read_prompts(config.policy, config.prompts)
    return [
        GroupRequest(
            prompt_token_ids=prompts[(first + i) % len(prompts)],
            sampling=Sampling(temperature=1.0, max_tokens=length, ignore_eos=True),
        )
        for i, length in enumerate(lengths)
    ]


def tokens(groups: Sequence[Group]) -> int:
    return sum(len(completion.token_ids) for group in groups for completion in group.completions)


def _figures(
    config: BenchConfig, kind: str, calibration: Calibration, speeds: dict[str, dict[int, list[float]]]
) -> list[Figure]:
    figures = []
    for name in [name for name in speeds if name != "none"]:
        for streams in config.rollout_speed.streams:
            ratios = [a / b for a, b in zip(speeds[name][streams], speeds["none"][streams], strict=True)]
            more: dict[str, Any] = {}
            if name == "calibrated":
                more = {
                    "goal": GOALS.get(streams, NEVER_BELOW),
                    "predicted": calibration.predicted_speedup.get(streams),
                }
            what = f"{kind}, {name}, {streams} stream{'s' * (streams > 1)}"
            figures.append(figure("rollout_speed", what, "x", ratios, **more))
    return figures
