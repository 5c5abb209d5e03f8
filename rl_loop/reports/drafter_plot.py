"""Drafter plot, acceptance.png: acceptance and reward by training step, with the drafter's pushes marked."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from rl_loop.reports.drafter_metrics import DrafterMetrics
from rl_loop.reports.metrics import StepMetrics


def pushes(drafter: Sequence[DrafterMetrics]) -> list[int]:
    """The steps whose rollouts were the first that a new drafter version drafted."""
    return [after.step for before, after in pairwise(drafter) if after.drafter_version != before.drafter_version]


def plot_acceptance(file: Path, steps: Sequence[StepMetrics], drafter: Sequence[DrafterMetrics]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), layout="constrained")
    length, positions, reward = figure.subplots(3, 1, sharex=True)
    numbers = [m.step for m in drafter]
    length.plot(numbers, [m.acceptance_length for m in drafter], marker=".")
    length.set_ylabel("acceptance length")
    for i, shares in enumerate(zip(*(m.acceptance_by_position for m in drafter), strict=True), start=1):
        positions.plot(numbers, shares, marker=".", label=f"position {i}")
    positions.set_ylabel("accepted")
    positions.set_ylim(0, 1)
    positions.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    reward.plot([m.step for m in steps], [m.reward for m in steps], marker=".", color="tab:green")
    reward.set_ylabel("mean reward")
    reward.set_xlabel("step (dotted line: first rollouts of a new drafter version)")
    for axes in (length, positions, reward):
        axes.grid(alpha=0.3)
        for step in pushes(drafter):
            axes.axvline(step, color="grey", linestyle=":", linewidth=0.8)
    figure.savefig(file, dpi=120)
