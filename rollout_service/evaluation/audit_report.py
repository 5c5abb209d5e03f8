"""Report of the audit: a table in the terminal, audit.json and audit.md."""

import json
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from rollout_service.evaluation.audit_config import AuditConfig
from rollout_service.evaluation.audit_row import AuditRow
from rollout_service.evaluation.router_ties import RouterTies
from rollout_service.evaluation.short_names import short_names

COLUMNS = (
    "drafter", "model", "drafts", "verified", "T", "top-p", "top-k", "tokens", "z", "worst position", "first two, p",
    "Δlogp", "mean", "accepted", "detects: nats", "T", "TV", "verdict",
)  # fmt: skip

TIE_COLUMNS = (
    "drafter", "T", "top-p", "top-k", "positions", "near ties", "ties", "expected", "p", "tokens in reach", "expected",
    "flips", "excused", "largest",
)  # fmt: skip
INCOMPARABLE = (
    "The policy is routed, and not all is in float32: rounding then decides often which experts are chosen. So "
    "log-probabilities of single tokens are not comparable, nor are greedy responses. All else was tested."
)


def write_report(rows: list[AuditRow], config: AuditConfig, console: Console) -> None:
    """Print the table and write both files to `config.output`."""
    config.output.mkdir(parents=True, exist_ok=True)
    (config.output / "audit.json").write_text(
        json.dumps([row.model_dump() for row in rows], indent=2) + "\n", encoding="utf-8"
    )
    (config.output / "audit.md").write_text(markdown(rows), encoding="utf-8")
    console.print(terminal_table(rows, config))
    if any(row.router_ties for row in rows):
        console.print(ties_table(rows))
    if any(row.untested for row in rows):
        console.print(INCOMPARABLE)
    failed = [row for row in rows if row.failures]
    tokens = f"{sum(row.tokens for row in rows):,} tokens"
    console.print(
        f"[bold red]{len(failed)} of {len(rows)} rows fail[/]: samples do not follow the policy."
        if failed
        else f"All {len(rows)} rows pass ({tokens}): as far as they can tell, drafting does not change what is sampled."
    )
    console.print(f"written to {config.output}: audit.json, audit.md", soft_wrap=True)


def cells(row: AuditRow, names: dict[str, str]) -> list[str]:
    """A row as text, in the order of COLUMNS. `names`: short names of the drafters' checkpoints."""
    drafting = row.drafter != "none"
    return [
        f"{row.drafter} {row.draft_tokens}" if drafting else row.drafter,
        names[row.model],
        row.draft_sampling if drafting else "",
        row.verification if drafting else "",
        f"{row.temperature:g}",
        f"{row.top_p:g}",
        str(row.top_k or "off"),
        str(row.tokens),
        *statistics(row),
        f"{row.logprob_difference_max:.0e}",
        f"{row.logprob_difference_mean:.0e}",
        f"{row.acceptance_length:.2f}" if drafting else "",
        *detectable(row),
        verdict(row),
    ]


def verdict(row: AuditRow) -> str:
    if row.failures:
        return ", ".join(row.failures)
    notes = [f"{name} untested" for name in row.untested]
    if row.router_ties and row.router_ties.excused:
        notes.insert(0, f"{row.router_ties.excused} excused")
    if row.logprobs_in_float64:
        notes.insert(0, f"{row.logprobs_in_float64} in float64")
    return ", ".join(["pass", *notes])


def statistics(row: AuditRow) -> list[str]:
    """z; the position with the largest |z|; the smallest p-value of the first two tokens. At temperature 0, the number
    of responses that are equal instead."""
    if row.greedy is not None:
        ties = f", {row.greedy.explained} near ties" if row.greedy.explained else ""
        ties += f", {row.greedy.after_router_ties} after router ties" if row.greedy.after_router_ties else ""
        return ["", f"{row.greedy.identical}/{row.greedy.compared} equal{ties}", ""]
    assert row.z is not None
    assert row.fit is not None
    worst = max(row.positions, key=lambda name: abs(row.positions[name].z))
    fit = min(row.fit.p_first, row.fit.p_both, row.fit.p_worst_context)
    return [f"{row.z:+.2f}", f"{worst} {row.positions[worst].z:+.2f}", f"{fit:.2g}"]


def detectable(row: AuditRow) -> list[str]:
    if row.detectable is None:
        return ["", "", ""]
    found = row.detectable
    return [f"{found.nats_per_token:.4f}", f"{found.temperature:.1%}", f"{found.total_variation:.3f}"]


def cells_of_ties(row: AuditRow, ties: RouterTies) -> list[str]:
    """The ties of a row's routers as text, in the order of TIE_COLUMNS."""
    return [
        *(cells(row, {row.model: ""})[i] for i in (0, 4, 5, 6)),
        str(ties.positions),
        str(ties.near),
        str(ties.ties),
        f"{ties.ties_expected:.2f}",
        f"{ties.p:.2g}",
        str(ties.tokens_in_reach),
        f"{ties.tokens_in_reach_expected:.0f}",
        str(ties.flips),
        str(ties.excused),
        f"{ties.largest_excused:.0e}" if ties.excused else "",
    ]


def terminal_table(rows: list[AuditRow], config: AuditConfig) -> Table:
    table = Table(title=f"Losslessness of {config.endpoint or config.model}", padding=(0, 1), box=None)
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if i in (0, 1, 2, 3, 9, 17) else "right", no_wrap=True)
    names = short_names(row.model for row in rows)
    for row in rows:
        table.add_row(*cells(row, names), style="red" if row.failures else None)
    return table


def ties_table(rows: list[AuditRow]) -> Table:
    table = Table(title="Ties of the policy's routers", padding=(0, 1), box=None)
    for i, column in enumerate(TIE_COLUMNS):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        if row.router_ties:
            failed = "too many router ties" in row.failures
            table.add_row(*cells_of_ties(row, row.router_ties), style="red" if failed else None)
    return table


def markdown(rows: list[AuditRow]) -> str:
    names = short_names(row.model for row in rows)
    parts = [markdown_table(COLUMNS, [cells(row, names) for row in rows])]
    of_ties = [cells_of_ties(row, row.router_ties) for row in rows if row.router_ties]
    parts += [f"Ties of the policy's routers:\n\n{markdown_table(TIE_COLUMNS, of_ties)}"] if of_ties else []
    parts += [f"{INCOMPARABLE}\n"] if any(row.untested for row in rows) else []
    return "\n".join(parts)


def markdown_table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in (columns, ["---"] * len(columns), *lines))
