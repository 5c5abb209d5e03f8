"""Learning curves of both demo policies under the same recipe, side by side.

    .venv/bin/python deploy/demo/recipe/learning_curves.py            450 steps, seeds 0 to 2
    .venv/bin/python deploy/demo/recipe/learning_curves.py --plot     only the plot, from what is there

A seed decides the first weights and the training problems: the families of a seed see the same problems in the same
order. Each run has a core of its own. Its steps and the load of its experts are written to a folder in `--records` when
it ends, and a run that has such a folder is not trained again. Writes learning_curves.json and learning_curves.png to
`--output`, and prints the ends of the curves.
"""

import argparse
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from make_models import BATCH_SIZE, DEMO, HELD_OUT_SEED, SLIPS, TRAINING_SEED, problems
from matplotlib.figure import Figure
from policy import FAMILIES, train_policy
from transformers import AutoTokenizer

from drafters.files.text_lines import json_lines

RESULTS = Path(__file__).parent / "results"
NAMES = {"qwen3_next": "Qwen3-Next, 2 of 2 experts", "latent_moe": "LatentMoE, 5 of 16 experts"}
EVALUATED = 256
SMOOTHED = 10
"""steps over which a curve of losses is averaged"""


def train(family: str, seed: int, steps: int, router_coefficient: float, folder: Path) -> None:
    torch.set_num_threads(1)
    train_policy(
        family,
        problems(TRAINING_SEED + seed * 100_000, BATCH_SIZE * steps),
        problems(HELD_OUT_SEED, EVALUATED),
        AutoTokenizer.from_pretrained(DEMO / "models" / "policy"),
        steps=steps, slips=SLIPS, batch_size=BATCH_SIZE, seed=seed,
        router_coefficient=router_coefficient if family == "latent_moe" else 0.0, records=folder,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--router-coefficient", type=float, default=0.01, help="of the load-balancing loss")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--records", type=Path, default=Path("report") / "learning-curves", help="folders of the runs")
    parser.add_argument("--plot", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "learning_curves.json"
    if not arguments.plot:
        train_all(arguments)
        file.write_text(json.dumps(collect(arguments), indent=1) + "\n", encoding="utf-8")
    curves = json.loads(file.read_text(encoding="utf-8"))
    plot(curves, arguments.output / "learning_curves.png")
    print(table(curves))


def train_all(arguments: argparse.Namespace) -> None:
    """Trains each run that has no finished records yet, one on each core."""
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        runs = [
            pool.submit(train, family, seed, arguments.steps, arguments.router_coefficient, records)
            for seed in arguments.seeds
            for family in FAMILIES
            for records in [arguments.records / f"{family}-{seed}"]
            if not (records / "steps.jsonl").exists()
        ]
        for run in runs:
            run.result()


def collect(arguments: argparse.Namespace) -> dict:
    """Loss of every step, and share of right answers where it was measured, by family and seed."""
    runs = [
        {"family": family, "seed": seed, **curve(arguments.records / f"{family}-{seed}" / "steps.jsonl")}
        for family in FAMILIES
        for seed in arguments.seeds
    ]
    return {"steps": arguments.steps, "router_coefficient": arguments.router_coefficient, "runs": runs}


def curve(file: Path) -> dict:
    lines = list(json_lines(file, dict))
    last = lines[-1]
    loads = np.array(last["expert_load"]) * len(last["expert_load"][0])
    return {
        "loss": [round(line["loss"], 4) for line in lines],
        "right": {line["step"]: round(line["right"], 4) for line in lines if line["right"] is not None},
        "load": [round(loads.min(), 2), round(loads.max(), 2)],
        "router_entropy": round(float(np.mean(last["router_entropy"])), 3),
    }


def table(curves: dict) -> str:
    """The ends of the curves, as Markdown."""
    steps = curves["steps"]
    quarter = steps // 4
    lines = [
        f"| policy | seed | loss after {quarter} steps | after {steps} | right | loads of experts | router entropy |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for run in curves["runs"]:
        early, last = np.mean(run["loss"][:quarter][-SMOOTHED:]), np.mean(run["loss"][-SMOOTHED:])
        low, high = run["load"]
        lines.append(
            f"| {NAMES[run['family']]} | {run['seed']} | {early:.3f} | {last:.4f} | {run['right'][str(steps)]:.1%} "
            f"| {low:.2f} to {high:.2f} | {run['router_entropy']:.2f} |"
        )
    return "\n".join(lines)


def plot(curves: dict, file: Path) -> None:
    figure = Figure(figsize=(9, 4), layout="constrained")
    losses, rights = figure.subplots(1, 2)
    for family, colour in zip(FAMILIES, ("C0", "C1"), strict=True):
        for run in curves["runs"]:
            if run["family"] == family:
                label = NAMES[family] if run["seed"] == curves["runs"][0]["seed"] else None
                smooth = np.convolve(run["loss"], np.ones(SMOOTHED) / SMOOTHED, mode="valid")
                steps = np.arange(SMOOTHED, len(run["loss"]) + 1)
                losses.plot(steps, smooth, color=colour, label=label, linewidth=1)
                rights.plot(
                    [int(step) for step in run["right"]], run["right"].values(), "o-", color=colour, label=label
                )
    losses.set_yscale("log")
    losses.set_ylabel(f"loss in nats (mean of {SMOOTHED} steps)")
    rights.set_ylabel(f"right of {EVALUATED} held-out problems")
    for axes in (losses, rights):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
