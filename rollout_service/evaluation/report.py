"""Report of the comparison: tables in the terminal, compare.json, costs.json, compare.md, and two plots."""

import json
import statistics
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from drafters import cost_report
from drafters.cost_report import CostReport, Step
from drafters.files.model_folder import resolve_model
from drafters.registry import KINDS, DrafterConfig
from rollout_service.evaluation.compare_config import CompareConfig
from rollout_service.evaluation.rows import Z_LIMIT, Row
from rollout_service.evaluation.short_names import short_names

COLUMNS = (
    "drafter", "model", "k", "drafts", "verified", "streams", "acceptance length", "rate", "by position", "tokens/s",
    "speed-up", "z", "tokens",
)  # fmt: skip


def write_report(rows: list[Row], config: CompareConfig, console: Console) -> None:
    """Print the table and write everything to `config.output`."""
    config.output.mkdir(parents=True, exist_ok=True)
    (config.output / "compare.json").write_text(
        json.dumps([row.model_dump(mode="json") for row in rows], indent=2) + "\n", encoding="utf-8"
    )
    costs = costs_of(rows, config)
    (config.output / "costs.json").write_text(costs.model_dump_json(indent=2) + "\n", encoding="utf-8")
    (config.output / "compare.md").write_text(f"{markdown(rows)}\n{cost_report.markdown(costs)}", encoding="utf-8")
    plot_acceptance(rows, config)
    plot_speed(rows, config)
    console.print(terminal_table(rows, config), *cost_report.terminal(costs))
    failed = [row for row in rows if not row.is_lossless]
    fewest = min(row.tokens for row in rows)
    console.print(
        f"[bold red]{len(failed)} row(s) are not lossless: |z| is {Z_LIMIT:.0f} or more[/]"
        if failed
        else f"All rows are lossless as far as {fewest:,} tokens each can tell: |z| < {Z_LIMIT:.0f}."
    )
    files = "compare.json, costs.json, compare.md, acceptance.png, speedup.png"
    console.print(f"written to {config.output}: {files}", soft_wrap=True)


def costs_of(rows: list[Row], config: CompareConfig) -> CostReport:
    """Of the policy and of every drafter: a step for each draft length and concurrency. Its seconds are the mean over
    the ways to sample and verify the drafts, which read the same."""
    names = short_names(row.model for row in rows)
    alike: dict[tuple[str, str, int, int], list[Row]] = {}
    for row in rows:
        alike.setdefault((row.drafter, row.model, row.draft_tokens, row.concurrency), []).append(row)
    steps = [
        Step(
            f"{drafter} {names[model]}".strip(),
            DrafterConfig(kind=drafter, model=model or None, draft_tokens=k or 1, schedule="fixed"),
            streams,
            statistics.mean(row.step_seconds for row in measured),
        )
        for (drafter, model, k, streams), measured in alike.items()
    ]
    context = statistics.mean(row.context for row in rows)
    return cost_report.cost_report(resolve_model(config.model), steps, context=context, dtype=rows[0].dtype)


def cells(row: Row, names: dict[str, str]) -> list[str]:
    """A row as text, in the order of COLUMNS. `names`: short names of the drafters' checkpoints."""
    off = row.drafter == "none"
    low, high = row.acceptance_length_ci or (0.0, 0.0)
    return [
        row.drafter,
        names[row.model],
        "" if off else str(row.draft_tokens),
        row.draft_sampling,
        row.verification,
        str(row.concurrency),
        "1" if off else f"{row.acceptance_length:.2f} ± {(high - low) / 2:.2f}",
        "" if off else f"{row.acceptance_rate:.1%}",
        " ".join(f"{share:.2f}" for share in row.acceptance_by_position),
        f"{row.tokens_per_second:.0f}",
        "" if row.speedup is None else f"{row.speedup:.2f}",
        f"{row.z:+.2f}",
        f"{row.tokens}",
    ]


def terminal_table(rows: list[Row], config: CompareConfig) -> Table:
    """The table without the columns that follow from others. The files have all columns."""
    work = f"temperature {config.temperature:g}, {config.response_tokens} tokens a response"
    table = Table(title=f"Drafters on {config.model}, {work}", box=SIMPLE, padding=(0, 1, 0, 0))
    shown = [i for i, column in enumerate(COLUMNS) if column not in ("rate", "tokens")]
    for i in shown:
        table.add_column(COLUMNS[i], justify="left" if i in (0, 1, 3, 4) else "right", no_wrap=True)
    names = short_names(row.model for row in rows)
    for row in rows:
        values = cells(row, names)
        table.add_row(*(values[i] for i in shown), style=None if row.is_lossless else "red")
    return table


def markdown(rows: list[Row]) -> str:
    names = short_names(row.model for row in rows)
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(cells(row, names) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


Drafter = tuple[str, str]
"""kind and checkpoint, because two heads of one kind are two drafters"""


def drafters_of(rows: list[Row]) -> list[Drafter]:
    return list(dict.fromkeys((row.drafter, row.model) for row in rows))


def style(row: Row, drafters: list[Drafter]) -> dict[str, Any]:
    """A colour for each drafter, and a line style for each way to sample and verify drafts."""
    way = "--" if row.draft_sampling == "greedy" else ":" if row.verification.startswith("block") else "-"
    return {"color": f"C{drafters.index((row.drafter, row.model))}", "linestyle": way, "marker": "o"}


def label(row: Row, drafters: list[Drafter], names: dict[str, str]) -> str:
    """The drafter's name in a legend, with its checkpoint if another drafter is of the same kind."""
    alike = [kind for kind, _ in drafters].count(row.drafter) > 1
    name = f"{row.drafter} {names[row.model]}".strip() if alike else row.drafter
    greedy = ", greedy drafts" if row.draft_sampling == "greedy" and KINDS[row.drafter].samples else ""
    return f"{name}, k={row.draft_tokens}{greedy}" + (", block" if row.verification.startswith("block") else "")


def plot_acceptance(rows: list[Row], config: CompareConfig) -> None:
    """Acceptance by position, one line for each drafter, at the lowest concurrency."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    drafting = [r for r in rows if r.drafter != "none" and r.concurrency == min(config.concurrency)]
    drafters, names = drafters_of(drafting), short_names(row.model for row in drafting)
    for row in drafting:
        positions = range(1, len(row.acceptance_by_position) + 1)
        axes.plot(positions, row.acceptance_by_position, label=label(row, drafters, names), **style(row, drafters))
    axes.set_xticks(range(1, max((r.draft_tokens for r in drafting), default=1) + 1))
    axes.set_xlabel("position in the draft")
    axes.set_ylabel("share of steps that accept it")
    axes.set_ylim(0, 1)
    axes.set_title("Acceptance by position")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(config.output / "acceptance.png", dpi=120)


def plot_speed(rows: list[Row], config: CompareConfig) -> None:
    """Speed relative to no drafter by concurrency, one line for each drafter."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    drafting = [r for r in rows if r.drafter != "none" and r.speedup is not None]
    drafters, names = drafters_of(drafting), short_names(row.model for row in drafting)
    for name, row in {label(row, drafters, names): row for row in drafting}.items():
        points = [(r.concurrency, r.speedup) for r in drafting if label(r, drafters, names) == name]
        axes.plot(*zip(*points, strict=True), label=name, **style(row, drafters))
    axes.axhline(1.0, color="black", linewidth=1, label="none")
    axes.set_xscale("log", base=2)
    axes.set_xticks(config.concurrency, [str(c) for c in config.concurrency])
    axes.set_xlabel("completions at the same time")
    axes.set_ylabel("speed relative to no drafter")
    axes.set_title("Speed-up by concurrency")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(config.output / "speedup.png", dpi=120)
