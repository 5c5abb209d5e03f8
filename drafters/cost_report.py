"""CostReport: what a run's policy and drafters cost by their configurations, as JSON and as two small tables.

Everything but `seconds` is computed (policy_costs.py). A run that measured its steps gives their seconds beside.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, Field
from rich.box import SIMPLE
from rich.table import Table

from drafters.policy_costs import Costs, DraftCosts, policy_costs
from drafters.registry import DrafterConfig, make_drafter

ELEMENT = {"float32": 4, "bfloat16": 2, "float16": 2}
"""bytes of a number"""


class ModelCosts(BaseModel):
    """The policy, or a drafter with weights."""

    model: str
    parameters: int
    """its own; an MTP head's do not include the policy's embedding and output head, which it uses too"""
    active_parameters: int
    """all but the routed experts that a token does not choose"""
    flops_per_token: int
    """of a forward pass at the report's context; of a drafter, of its first pass in a step"""


class StepCosts(BaseModel):
    """A decoding step."""

    drafter: str
    """the name of the drafter; none without one"""
    draft_tokens: int
    """the step verifies so many for each stream; 0 without a drafter"""
    streams: int
    """sequences in the step"""
    policy_bytes: int
    """read by the policy"""
    drafter_bytes: int | None
    """read while the next draft is made; None if there are no formulas"""
    seconds: float | None = None
    """measured; None if the run does not measure its steps"""


class Step(NamedTuple):
    """A decoding step to count."""

    name: str
    drafter: DrafterConfig
    streams: int
    seconds: float | None = None


class CostReport(BaseModel):
    context: float
    """tokens of each sequence's context"""
    dtype: str | None
    """dtype of weights and caches; None if there are no steps"""
    models: list[ModelCosts] = Field(default_factory=list)
    steps: list[StepCosts] = Field(default_factory=list)
    not_known: dict[str, str] = Field(default_factory=dict)
    """for each model without formulas: why"""


def cost_report(policy: Path, steps: Iterable[Step], *, context: float, dtype: str | None) -> CostReport:
    """Of the policy in a folder, and of the drafters of these steps. `context`: tokens, mean over the steps."""
    from transformers import AutoConfig

    import drafters.latent_moe  # noqa: F401

    report = CostReport(context=context, dtype=dtype)
    try:
        config = AutoConfig.from_pretrained(policy)
        own = policy_costs(config)
    except (ValueError, OSError) as error:
        report.not_known["policy"] = str(error)
        return report
    report.models.append(_model("policy", own, context))
    drafting: dict[str, DraftCosts | None] = {}
    for step in steps:
        if step.name not in drafting:
            try:
                drafting[step.name] = make_drafter(step.drafter).costs(config)
            except (ValueError, OSError) as error:
                report.not_known[step.name] = str(error)
                drafting[step.name] = None
            if (found := drafting[step.name]) is not None:
                report.models.append(_model(step.name, found.first, context))
        costs, length = drafting[step.name], step.drafter.draft_tokens if step.drafter.drafts else 0
        size = step.streams, context, ELEMENT[dtype or ""]
        no_weights = None if step.name in report.not_known else 0
        report.steps.append(
            StepCosts(
                drafter=step.name,
                draft_tokens=length,
                streams=step.streams,
                policy_bytes=own.step_bytes(*size, tokens=length + 1),
                drafter_bytes=no_weights if costs is None else costs.draft_bytes(*size, length),
                seconds=step.seconds,
            )
        )
    return report


def _model(name: str, costs: Costs, context: float) -> ModelCosts:
    return ModelCosts(
        model=name,
        parameters=costs.parameters,
        active_parameters=costs.active_parameters,
        flops_per_token=costs.flops_per_token(context),
    )


MODEL_COLUMNS = ("model", "parameters", "active", "FLOPs a token")
STEP_COLUMNS = ("drafter", "k", "streams", "policy reads", "drafter reads")


def model_cells(report: CostReport) -> list[Sequence[str]]:
    return [
        (m.model, f"{m.parameters:,}", f"{m.active_parameters:,}", scaled(m.flops_per_token)) for m in report.models
    ]


def step_columns(report: CostReport) -> Sequence[str]:
    return (*STEP_COLUMNS, "ms a step, measured") if any(step.seconds for step in report.steps) else STEP_COLUMNS


def step_cells(report: CostReport) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = []
    for step in report.steps:
        read = "not known" if step.drafter_bytes is None else scaled(step.drafter_bytes) + "B"
        measured = [] if step.seconds is None else [f"{1000 * step.seconds:.2f}"]
        k = str(step.draft_tokens or "")
        rows.append((step.drafter, k, str(step.streams), scaled(step.policy_bytes) + "B", read, *measured))
    return rows


def title(report: CostReport) -> str:
    numbers = f" in {report.dtype}" if report.dtype else ""
    return f"Computed from the configurations, for {report.context:.0f} tokens of context{numbers}"


def tables(report: CostReport) -> list[tuple[Sequence[str], list[Sequence[str]]]]:
    """Columns and rows: of the models, and of the decoding steps."""
    return [(MODEL_COLUMNS, model_cells(report)), (step_columns(report), step_cells(report))]


def terminal(report: CostReport) -> list[Table | str]:
    """The two tables, and a line for each model without formulas."""
    shown: list[Table | str] = [f"{title(report)}:"]
    for columns, rows in tables(report):
        if rows:
            table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
            for i, column in enumerate(columns):
                table.add_column(column, justify="right" if i else "left", no_wrap=True)
            for row in rows:
                table.add_row(*row)
            shown.append(table)
    return [*shown, *notes(report)]


def markdown(report: CostReport) -> str:
    """The two tables, and a line for each model without formulas."""
    parts = [f"{title(report)}:\n"]
    for columns, rows in tables(report):
        if rows:
            lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
            parts.append("".join(f"| {' | '.join(line)} |\n" for line in lines))
    parts += [f"{line}\n" for line in notes(report)]
    return "\n".join(parts)


def notes(report: CostReport) -> list[str]:
    return [f"The costs of {name} are not known: {reason}." for name, reason in report.not_known.items()]


def scaled(number: float) -> str:
    """Three significant digits and a decimal prefix: `3.91 M`."""
    for prefix in ("", "k", "M", "G", "T"):
        if number < 999.5 or prefix == "T":
            break
        number /= 1000
    digits = max(0, 2 - len(str(int(number))) + 1)
    return f"{number:.{digits}f} {prefix}" if prefix else f"{number:.0f} "
