"""`rollout-service calibrate`: costs of a step by batch size and draft length, and the draft lengths that pay.

start an engine without a drafter and one with it; on GPUs that hold only one, one after the other
for each round, at each batch size:     measure the first, then the second at every draft length
choose, predict, write the file that `drafter.schedule` names
"""

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from rich.box import SIMPLE
from rich.progress import Progress
from rich.table import Table

from drafters.files.durable import check_folder
from drafters.registry import DrafterConfig
from drafters.schedule import Calibration, StepCosts, choose_drafts, to_ranges
from drafters.speed_prediction import speedup
from rollout_service.engine.hardware import resolve_device
from rollout_service.engine.measuring import Plan
from rollout_service.engine.step_costs import Measured
from rollout_service.evaluation.arms import EngineArm
from rollout_service.evaluation.calibrate_config import CalibrateConfig
from rollout_service.evaluation.machine import machine
from rollout_service.evaluation.prompts import read_prompts
from rollout_service.evaluation.running import progress, report_console, started_engines
from rollout_service.fleet.member import FleetError
from rollout_service.fleet.resources import check_machine, engines_that_fit

Grid = list[list[float]]
"""[draft length][batch size]"""


def calibrate(config: CalibrateConfig) -> Calibration:
    """Measure, choose, print, and write `config.output`. Exits with 1 when an engine fails."""
    console = report_console()
    try:
        check_folder(config.output.parent, "output")
        if config.output.is_dir():
            raise ValueError(f"output: {config.output} is a folder; give a file")
        with progress(console) as bar:
            turns = asyncio.run(_measure(config, bar))
    except (FleetError, ValueError, OSError) as error:
        sys.exit(f"rollout-service calibrate: {error}")
    except KeyboardInterrupt:
        sys.exit("rollout-service calibrate: interrupted; nothing was written")
    finally:
        ray.shutdown()
    calibration = choose(config, turns)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    config.output.write_text(json.dumps(calibration.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")
    console.print(table(calibration))
    console.print(f'written to {config.output}; use it with schedule = "{config.output}" under \\[drafter]')
    return calibration


@dataclass
class Turns:
    """What was measured on two engines, one entry for each round."""

    plain: list[Measured]
    """of the engine without a drafter"""
    drafting: list[Measured]
    acceptance: list[float]
    """by position"""

    def costs(self, sizes: Sequence[int], draft_tokens: int) -> tuple[StepCosts, StepCosts]:
        """Costs of the engine without a drafter, and of the one with it. Each round compares the two with each other,
        because a machine that is slow for a minute is slow for both."""
        lengths = range(draft_tokens + 1)
        rounds = list(zip(self.plain, self.drafting, strict=True))
        reached = [b for b in sizes if all(p.reached([b], [0]) and d.reached([b], lengths) for p, d in rounds)]
        plain = [p.costs(reached, 0) for p, _ in rounds]
        drafting = [d.costs(reached, draft_tokens) for _, d in rounds]

        def relative(plain: list[Grid], drafting: list[Grid]) -> tuple[Grid, Grid]:
            usual = np.median(plain, axis=0)
            return usual.tolist(), (usual * np.median(np.divide(drafting, plain), axis=0)).tolist()

        seconds = relative([c.seconds for c in plain], [c.seconds for c in drafting])
        first = relative([c.first for c in plain], [c.first for c in drafting])
        without, with_it = (
            StepCosts(batch_sizes=reached, seconds=s, first=f) for s, f in zip(seconds, first, strict=True)
        )
        return without, with_it


async def _measure(config: CalibrateConfig, bar: Progress) -> Turns:
    plain, device = config.service(DrafterConfig()), resolve_device(config.engine.device)
    fits = engines_that_fit(plain, device)
    check_machine(plain, device, turns=min(2, max(1, fits)))
    without = EngineArm(plain)
    with_it = EngineArm(config.service(config.measured_drafter()))
    if fits < 2:
        return await measure_one_by_one(config, without, with_it, bar)
    async with started_engines([without, with_it], bar):
        return await measure_in_turns(config, without, with_it, bar)


def plan(
    config: CalibrateConfig, prompts: list[list[int]], size: int, draft_lengths: list[int] | None, **more: Any
) -> Plan:
    return Plan(
        prompts=prompts,
        batch_sizes=[size],
        draft_lengths=draft_lengths,
        steps=config.steps,
        response_tokens=config.response_tokens,
        temperature=config.temperature,
        **more,
    )


async def measure_in_turns(config: CalibrateConfig, without: EngineArm, with_it: EngineArm, bar: Progress) -> Turns:
    """Measure two engines that are in service already, in turns within each round."""
    plain, drafting = await measure_rounds(config, [without, with_it], bar)
    return Turns(plain, drafting, await measure_acceptance(config, with_it))


async def measure_one_by_one(config: CalibrateConfig, without: EngineArm, with_it: EngineArm, bar: Progress) -> Turns:
    """Measure one engine after the other, for a machine whose GPUs hold only one. The first has ended before the second
    starts."""
    async with started_engines([without], bar):
        (plain,) = await measure_rounds(config, [without], bar)
    async with started_engines([with_it], bar):
        (drafting,) = await measure_rounds(config, [with_it], bar)
        return Turns(plain, drafting, await measure_acceptance(config, with_it))


async def measure_rounds(config: CalibrateConfig, arms: Sequence[EngineArm], bar: Progress) -> list[list[Measured]]:
    """What each round measured, for each of these engines. Every other round goes backwards, because the order may
    matter."""
    prompts, every_length = read_prompts(config.model, config.prompts), list(range(config.drafter.draft_tokens + 1))
    of_arms: list[list[Measured]] = [[] for _ in arms]
    task = bar.add_task("measuring steps", total=config.rounds * len(config.sizes))
    for round in range(config.rounds):
        backwards = -1 if round % 2 else 1
        for measured in of_arms:
            measured.append(Measured())
        for size in config.sizes:
            for arm, measured in list(zip(arms, of_arms, strict=True))[::backwards]:
                lengths = every_length[::backwards] if arm.drafter.drafts else None
                measured[-1].add(await arm.fleet.measure(plan(config, prompts, size, lengths, warm_up=round == 0)))
            bar.advance(task)
    return of_arms


async def measure_acceptance(config: CalibrateConfig, arm: EngineArm) -> list[float]:
    """By position, with the longest drafts."""
    prompts, longest = read_prompts(config.model, config.prompts), config.drafter.draft_tokens
    drafting = plan(config, prompts, config.sizes[0], [longest], responses=config.responses)
    return (await arm.fleet.measure(drafting)).acceptance


def choose(config: CalibrateConfig, turns: Turns) -> Calibration:
    """The calibration that follows from the measurements."""
    baseline, costs = turns.costs(config.sizes, config.drafter.draft_tokens)
    drafts = choose_drafts(costs, turns.acceptance, config.engine.max_num_seqs)
    predicted = {"each": config.responses_per_stream, "tokens": config.response_tokens}
    return Calibration(
        policy=config.model,
        kind=config.drafter.kind,
        draft_tokens=config.drafter.draft_tokens,
        costs=costs,
        baseline=baseline,
        acceptance=turns.acceptance,
        ranges=to_ranges(drafts),
        predicted_speedup={
            b: speedup(costs, baseline, turns.acceptance, drafts, streams=b, **predicted) for b in costs.batch_sizes
        },
        response_tokens=config.response_tokens,
        responses_per_stream=config.responses_per_stream,
        machine=machine(resolve_device(config.engine.device)),
    )


def table(calibration: Calibration) -> Table:
    """Milliseconds of a step, the chosen draft length, and the predicted speed-up, one row for each batch size."""
    costs: StepCosts = calibration.costs
    rates = " ".join(f"{rate:.2f}" for rate in calibration.acceptance)
    result = Table(title=f"{calibration.kind} on {calibration.policy}: acceptance {rates}; ms per step", box=SIMPLE)
    lengths = range(costs.draft_tokens + 1)
    columns = ["streams", "no drafter", *(f"k = {k}" for k in lengths), "chosen", "predicted speed-up"]
    for column in columns:
        result.add_column(column, justify="right", no_wrap=True)
    for i, batch in enumerate(costs.batch_sizes):
        times = [calibration.baseline.seconds[0][i], *(costs.seconds[k][i] for k in lengths)]
        chosen = next(length for first, last, length in calibration.ranges if first <= batch <= last)
        gain = f"{calibration.predicted_speedup[batch]:.2f}"
        result.add_row(str(batch), *(f"{1e3 * t:.1f}" for t in times), str(chosen), gain)
    return result
