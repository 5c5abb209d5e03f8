"""Synchronous and asynchronous training compared on the demo policy: reward, exposed generation, time per step.

    python tests/benchmarks/asynchronous.py [--seeds 0 1 2] [--steps 12] [--TRAINER_FLAG ...]

All runs make the same number of updates on the same number of groups, one run after the other. With sync, trainer and
engine use both cores in turn; with async, each has one. Finished runs are not repeated. The script writes
figures.json, figures.md and reward.png.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

from drafters.files.text_lines import json_lines

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
sys.path.insert(0, str(ROOT / "tests" / "integration"))
MODES = ("async", "sync")
# For 2 cores: with sync each side has both in turn, with async each has one. Draft lengths are fixed in both.
SERVICE = {"sync": ["--drafter.schedule", "fixed"], "async": ["--drafter.schedule", "fixed", "--engine.cores", "1"]}
TRAINER = {"sync": [], "async": ["--threads", "1"]}


def lines(file: Path) -> list[dict]:
    return list(json_lines(file))


def measure(output: Path, seeds: list[int], more: list[str]) -> None:
    from engines import launched

    for mode in MODES:
        missing = [seed for seed in seeds if not (output / f"{mode}-{seed}" / "summary.json").exists()]
        if not missing:
            continue
        with launched("--config", "deploy/demo/service.toml", *SERVICE[mode]) as (url, _):
            for seed in missing:
                print(f"{mode}, seed {seed} ...", flush=True)
                folder = output / f"{mode}-{seed}"
                shutil.rmtree(folder, ignore_errors=True)
                subprocess.run(
                    [str(BIN / "rl-loop"), "train", "--config", "deploy/demo/train.toml", "--endpoint", url,
                     "--mode", mode, "--seed", str(seed), "--task.seed", str(seed * 100_000), "--output", str(folder),
                     "--checkpoint_every", "0", *TRAINER[mode], *more],
                    cwd=ROOT, check=True,
                )  # fmt: skip


def figures(output: Path, seeds: list[int]) -> dict[str, dict[str, float]]:
    """Means over the seeds. `reward_sd` is the standard deviation between seeds."""
    table = {}
    for mode in MODES:
        folders = [output / f"{mode}-{seed}" for seed in seeds]
        steps = [lines(folder / "metrics.jsonl") for folder in folders]
        held_out = np.array([[e["reward"] for e in lines(folder / "evaluations.jsonl")] for folder in folders])
        every = [step for run in steps for step in run]
        after_first = [step for run in steps for step in run[1:]]  # an asynchronous run starts without groups
        table[mode] = {
            "updates": len(steps[0]),
            "reward_before": held_out[:, 0].mean(),
            "reward_after": held_out[:, -1].mean(),
            "reward_sd": held_out[:, -1].std(ddof=1) if len(seeds) > 1 else float("nan"),
            "train_reward_last_4": np.mean([s["reward"] for run in steps for s in run[-4:]]),
            "exposed_generation": np.mean([s["exposed_generation"] for s in every]),
            "exposed_generation_after_the_first_step": np.mean([s["exposed_generation"] for s in after_first]),
            "seconds_a_step": np.mean([s["seconds"] for s in every]),
            "staleness": np.mean([s["staleness_mean"] for s in every]),
            "effective_sample_size": np.mean([s["effective_sample_size"] for s in every]),
            "tokens_wasted": np.mean([run[-1]["tokens_wasted"] for run in steps]),
            "tokens": np.mean([sum(s["tokens"] for s in run) for run in steps]),
        }
    return table


def plot(output: Path, seeds: list[int]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    rewards, exposed = figure.subplots(2, 1)
    for mode, colour in zip(MODES, ("tab:blue", "tab:orange"), strict=True):
        for seed in seeds:
            evaluations = lines(output / f"{mode}-{seed}" / "evaluations.jsonl")
            steps = lines(output / f"{mode}-{seed}" / "metrics.jsonl")
            label = mode if seed == seeds[0] else None
            rewards.plot(
                [e["step"] for e in evaluations], [e["reward"] for e in evaluations], "o-", c=colour, label=label
            )
            exposed.plot([s["step"] for s in steps], [s["exposed_generation"] for s in steps], c=colour, label=label)
    rewards.set(ylabel="held-out reward", xlabel="updates")
    exposed.set(ylabel="exposed generation, s", xlabel="step", ylim=(0, None))
    for axes in (rewards, exposed):
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        axes.grid(alpha=0.3)
    figure.savefig(output / "reward.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("report/asynchronous"))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--evaluate_every", type=int, default=6)
    chosen, more = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    output = chosen.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    measure(output, chosen.seeds, ["--steps", str(chosen.steps), "--evaluate_every", str(chosen.evaluate_every), *more])
    table = figures(output, chosen.seeds)
    (output / "figures.json").write_text(json.dumps(table, indent=2) + "\n")
    rows = [f"| {name} | {table['sync'][name]:.4g} | {table['async'][name]:.4g} |" for name in table["sync"]]
    text = "\n".join(["| | sync | async |", "|---|---|---|", *rows]) + "\n"
    (output / "figures.md").write_text(text)
    print(text)
    fall = 1.0 - table["async"]["exposed_generation"] / table["sync"]["exposed_generation"]
    print(f"exposed generation falls by {fall:.0%}")
    plot(output, chosen.seeds)


if __name__ == "__main__":
    main()
