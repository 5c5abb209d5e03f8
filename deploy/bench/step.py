"""Item 3: the time of whole training steps with and without speculation, in synchronous and in asynchronous mode.

Each run is `rl-loop train` against its own service, and the arms alternate. The details have the time of each stage.
With few slots, as in an engine with little memory, generation takes more of a step, and speculation gains more.
"""

import subprocess
import tempfile
from pathlib import Path
from typing import Any

from bench_config import BenchConfig
from figures import Figure, figure
from processes import BIN, launched

from drafters.files.text_lines import json_lines
from rollout_service.engine.hardware import machine_cores

GOAL = 1.6


def step(config: BenchConfig) -> tuple[list[Figure], Any]:
    slots = config.step.slots
    arms = [*(("sync", n) for n in slots), ("async", max(slots))]
    steps: dict[str, list[dict[str, Any]]] = {
        f"{mode}, {n} slots, {on}": [] for mode, n in arms for on in ("on", "off")
    }
    for run in range(config.step.runs):
        for mode, n in arms:
            for on in ("on", "off"):
                steps[f"{mode}, {n} slots, {on}"] += _train(config, mode, n, on, run)
    figures = []
    for mode, n in arms:
        on, off = steps[f"{mode}, {n} slots, on"], steps[f"{mode}, {n} slots, off"]
        # Seconds for each token: steps with the same seed generate different numbers of tokens, because samples differ.
        ratios = [b["seconds"] / b["tokens"] / (a["seconds"] / a["tokens"]) for a, b in zip(on, off, strict=True)]
        share = sum(s["stages"]["generation"] for s in off) / sum(s["seconds"] for s in off)
        what = f"{mode} step, {n} slots (generation is {share:.0%} of a step without drafter)"
        figures.append(figure("step", what, "x", ratios, goal=GOAL if mode == "sync" else None))
    return figures, {
        name: [{k: s[k] for k in ("seconds", "tokens", "stages")} for s in of] for name, of in steps.items()
    }


def _train(config: BenchConfig, mode: str, slots: int, speculation: str, seed: int) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl after the first. In asynchronous mode, engine and trainer have half the cores each."""
    plan, cores = config.step, machine_cores()
    half = max(1, cores // 2)
    of_engine = ["--engine.max_num_seqs", str(slots), *(["--engine.cores", str(half)] if mode == "async" else [])]
    of_trainer = ["--threads", str(half)] if mode == "async" else []
    drafter = (
        ["--drafter.kind", "none"] if speculation == "off" else ["--drafter.draft_sampling", config.draft_sampling]
    )
    with tempfile.TemporaryDirectory() as folder, launched("--config", str(plan.service), *drafter, *of_engine) as url:
        subprocess.run(
            [str(BIN / "rl-loop"), "train", "--config", str(plan.train), "--endpoint", url, "--mode", mode,
             "--steps", str(plan.steps), "--seed", str(seed), "--output", folder, "--checkpoint_every", "0",
             "--evaluate_every", "0", *of_trainer, *plan.flags],
            check=True,
        )  # fmt: skip
        return list(json_lines(Path(folder) / "metrics.jsonl"))[1:]
