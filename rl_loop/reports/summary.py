"""Summary of a run at its end: one table in the terminal, summary.json, and the plot reward.png."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from drafters.cost_report import CostReport, terminal
from rl_loop.reports.metrics import STAGES, EvaluationMetrics, StepMetrics


def write_summary(
    output: Path, steps: Sequence[StepMetrics], evaluations: Sequence[EvaluationMetrics], console: Console,
    *, prompts_skipped: int, costs: CostReport,
) -> None:  # fmt: skip
    """`prompts_skipped`: how many prompts were skipped because they leave no room for a response."""
    summary = summarise(steps, evaluations) | {"prompts_skipped": prompts_skipped, "costs": costs.model_dump()}
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    plot(output / "reward.png", steps, evaluations)
    console.print(summary_table(summary), *terminal(costs))
    console.print(f"written to {output}: metrics.jsonl, summary.json, reward.png, checkpoints/", soft_wrap=True)


def summarise(steps: Sequence[StepMetrics], evaluations: Sequence[EvaluationMetrics]) -> dict[str, Any]:
    """The summary as one record. `held_out` is None without evaluations. Times are in seconds."""
    seconds = {stage: sum(m.stages[stage] for m in steps) for stage in STAGES}
    accepted, draft_steps = sum(m.accepted for m in steps), sum(m.draft_steps for m in steps)
    return {
        "steps": len(steps),
        "held_out": _before_and_after(evaluations) if evaluations else None,
        "train": _before_and_after(steps),
        "z": steps[-1].z_running,
        "logprob_difference_max": max(m.logprob_difference_max for m in steps),
        "kl": float(np.mean([m.kl for m in steps])),
        "acceptance_length": 1.0 + accepted / draft_steps if draft_steps else None,
        "tokens": sum(m.tokens for m in steps),
        "tokens_per_second": sum(m.tokens for m in steps) / sum(m.tokens / m.tokens_per_second for m in steps),
        "seconds": sum(m.seconds for m in steps),
        "stages": seconds,
        "staleness": float(np.mean([m.staleness_mean for m in steps])),
        "importance_ratio": float(np.mean([m.importance_ratio for m in steps])),
        "effective_sample_size": float(np.mean([m.effective_sample_size for m in steps])),
        "clip_fraction": float(np.mean([m.clip_fraction for m in steps])),
        "masked": float(np.mean([m.masked for m in steps])),
        "exposed_generation": sum(m.exposed_generation for m in steps),
        "learner_idle": sum(m.learner_idle for m in steps),
        "engines_idle": sum(m.engines_idle or 0.0 for m in steps),
        "tokens_wasted": steps[-1].tokens_wasted,
        "groups_failed": sum(m.groups_failed for m in steps),
        "rewards_failed": sum(m.rewards_failed for m in steps),
    }


def _before_and_after(metrics: Sequence[StepMetrics] | Sequence[EvaluationMetrics]) -> dict[str, float]:
    first, last = metrics[0], metrics[-1]
    return {
        "reward_before": first.reward,
        "reward_after": last.reward,
        "pass_rate_before": first.pass_rate,
        "pass_rate_after": last.pass_rate,
    }


def summary_table(summary: dict[str, Any]) -> Table:
    table = Table(title=f"{summary['steps']} steps, {summary['seconds']:.0f} s")
    for column, justify in (("", "left"), ("before", "right"), ("after", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for key, name in (("held_out", "held out"), ("train", "training")):
        if (part := summary[key]) is not None:
            table.add_row(f"reward, {name}", f"{part['reward_before']:.3f}", f"{part['reward_after']:.3f}")
            table.add_row(f"right, {name}", f"{part['pass_rate_before']:.1%}", f"{part['pass_rate_after']:.1%}")
    table.add_section()
    length = summary["acceptance_length"]
    overall = {
        f"losslessness z, {summary['tokens']} tokens": f"{summary['z']:+.2f}",
        "largest log-probability difference": f"{summary['logprob_difference_max']:.1e}",
        "KL between trainer and rollouts": f"{summary['kl']:.1e}",
        "acceptance length": "no drafter" if length is None else f"{length:.2f}",
        "tokens per second of generation": f"{summary['tokens_per_second']:.0f}",
        "mean staleness, in versions": f"{summary['staleness']:.2f}",
        "effective sample size": f"{summary['effective_sample_size']:.3f}",
        "seconds of exposed generation": f"{summary['exposed_generation']:.1f}",
        "tokens wasted": str(summary["tokens_wasted"]),
        **{f"seconds, {stage}": f"{seconds:.1f}" for stage, seconds in summary["stages"].items()},
    }
    for name, value in overall.items():
        table.add_row(name, "", value)
    return table


def plot(file: Path, steps: Sequence[StepMetrics], evaluations: Sequence[EvaluationMetrics]) -> None:
    """The reward by step, above stacked bars of each stage's seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    rewards, times = figure.subplots(2, 1, sharex=True)
    numbers = [m.step for m in steps]
    rewards.plot(numbers, [m.reward for m in steps], marker=".", label="training")
    if evaluations:
        rewards.plot([m.step for m in evaluations], [m.reward for m in evaluations], marker="o", label="held out")
    rewards.set_ylabel("mean reward")
    rewards.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    rewards.grid(alpha=0.3)
    bottom = np.zeros(len(steps))
    for stage in STAGES:
        seconds = np.array([m.stages[stage] for m in steps])
        times.bar(numbers, seconds, bottom=bottom, label=stage)
        bottom += seconds
    times.set_xlabel("step")
    times.set_ylabel("seconds")
    times.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(file, dpi=120)
