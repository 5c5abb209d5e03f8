"""Figures of the benchmark with intervals and goals, their JSON files, and the table of all figures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

ITEMS = {
    "rollout_speed": "1. Rollout speed",
    "rollout_batch": "2. Long-tailed batch",
    "step": "3. Training step",
    "service": "4. Service against bare engine",
    "weights": "5. Weights",
    "learner": "6. Learner",
    "start": "7. Start",
    "routes": "8. Routes of single requests",
}


class Figure(BaseModel):
    """One line of the table."""

    item: str
    what: str
    unit: str
    median: float
    interval: tuple[float, float]
    """95 % interval of the median over rounds, by bootstrap"""
    rounds: int
    goal: float | None = None
    at_least: bool = True
    """whether the goal is a lower bound; if not, it is an upper bound"""
    predicted: float | None = None

    @property
    def is_met(self) -> bool | None:
        if self.goal is None:
            return None
        return self.median >= self.goal if self.at_least else self.median <= self.goal


def figure(item: str, what: str, unit: str, values: Sequence[float], **more: Any) -> Figure:
    """A figure from one value for each round."""
    draws = np.random.default_rng(0).choice(np.asarray(values), size=(2000, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return Figure(
        item=item, what=what, unit=unit, median=float(np.median(values)), interval=(float(low), float(high)),
        rounds=len(values), **more,
    )  # fmt: skip


def write_item(folder: Path, item: str, figures: Sequence[Figure], machine: dict[str, Any], details: Any) -> None:
    """Writes FOLDER/ITEM.json: the figures, the machine, and the measurements that the figures come from."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine, "figures": [f.model_dump(mode="json") for f in figures], "details": details}
    (folder / f"{item}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_table(folder: Path) -> str:
    """Writes FOLDER/README.md, the table of all items that were measured, and returns it."""
    lines = ["| item | measured | median | 95 % interval | predicted | goal | |", "|---|---|---:|---|---:|---:|---|"]
    met, machines = [], []
    for item, title in ITEMS.items():
        file = folder / f"{item}.json"
        if not file.exists():
            continue
        content = json.loads(file.read_text(encoding="utf-8"))
        machines.append(f"- {item}: {', '.join(f'{name} {value}' for name, value in content['machine'].items())}")
        for raw in content["figures"]:
            measured = Figure.model_validate(raw)
            lines.append(_line(title, measured))
            title = ""
            if measured.is_met is not None:
                met.append(measured.is_met)
    table = "\n".join(lines)
    where = "\n".join(machines)
    text = f"""# Results of the benchmark

`make bench` measured these figures and wrote this page. {sum(met)} of {len(met)} goals are met.

`deploy/bench/README.md` says what each item measures. A ratio (x) compares two arms within one run, in which they take
turns. A figure is the median over rounds. Its interval comes from a bootstrap of that median.

{table}

Measured on:

{where}
"""
    (folder / "README.md").write_text(text, encoding="utf-8")
    return text


def _line(title: str, figure: Figure) -> str:
    sign = "≥" if figure.at_least else "≤"
    goal = "" if figure.goal is None else f"{sign} {figure.goal:g}"
    met = {None: "", True: "met", False: "missed"}[figure.is_met]
    low, high = figure.interval
    predicted = "" if figure.predicted is None else f"{figure.predicted:.2f}"
    interval = f"{low:.2f} to {high:.2f}, {figure.rounds} rounds"
    return (
        f"| {title} | {figure.what} | {figure.median:.2f} {figure.unit} | {interval} | {predicted} | {goal} | {met} |"
    )
