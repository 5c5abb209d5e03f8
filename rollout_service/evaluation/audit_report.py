"""Report of the audit: a table in the terminal, audit.json and audit.md."""

import json

from rich.console import Console
from rich.table import Table

from rollout_service.evaluation.audit_config import AuditConfig
from rollout_service.evaluation.audit_row import AuditRow
from rollout_service.evaluation.short_names import short_names

COLUMNS = (
    "drafter", "model", "drafts", "verified", "T", "top-p", "top-k", "tokens", "z", "worst position", "first two, p",
    "Δlogp", "mean", "accepted", "detects: nats", "T", "TV", "verdict",
)  # fmt: skip


def write_report(rows: list[AuditRow], config: AuditConfig, console: Console) -> None:
    """Print the table and write both files to `config.output`."""
    config.output.mkdir(parents=True, exist_ok=True)
    (config.output / "audit.json").write_text(
        json.dumps([row.model_dump() for row in rows], indent=2) + "\n", encoding="utf-8"
    )
    (config.output / "audit.md").write_text(markdown(rows), encoding="utf-8")
    console.print(terminal_table(rows, config))
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
        ", ".join(row.failures) if row.failures else "pass",
    ]


def statistics(row: AuditRow) -> list[str]:
    """z; the position with the largest |z|; the smallest p-value of the first two tokens. At temperature 0, the number
    of responses that are equal instead."""
    if row.greedy is not None:
        ties = f", {row.greedy.explained} near ties" if row.greedy.explained else ""
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


def terminal_table(rows: list[AuditRow], config: AuditConfig) -> Table:
    table = Table(title=f"Losslessness of {config.endpoint or config.model}", padding=(0, 1), box=None)
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if i in (0, 1, 2, 3, 9, 17) else "right", no_wrap=True)
    names = short_names(row.model for row in rows)
    for row in rows:
        table.add_row(*cells(row, names), style="red" if row.failures else None)
    return table


def markdown(rows: list[AuditRow]) -> str:
    names = short_names(row.model for row in rows)
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(cells(row, names) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
