"""Page of training metrics, docs/reference/training-metrics.md: what `rl-loop train` writes of each step."""

import ast
import inspect
from itertools import pairwise

from pydantic import BaseModel

from generate.markdown import code, compose, marked, table
from generate.schema import type_of
from rl_loop.reports.drafter_metrics import AcceptanceAtLength, DrafterMetrics
from rl_loop.reports.metrics import EvaluationMetrics, StepMetrics
from rl_loop.reports.metrics_log import DRAFTER_FILE, EVALUATIONS_FILE, STEPS_FILE

FILES: dict[str, tuple[type[BaseModel], str]] = {
    STEPS_FILE: (StepMetrics, "Each line is a training step."),
    EVALUATIONS_FILE: (EvaluationMetrics, "Each line is an evaluation on held-out problems."),
    DRAFTER_FILE: (DrafterMetrics, "Each line is a step that was sampled with a drafter."),
}


def page() -> str:
    parts = ["With `tensorboard = true` the numbers are also written as TensorBoard events."]
    for file, (metrics, said) in FILES.items():
        parts += [f"## {file}", said, _table(metrics)]
    parts += [
        f"### {AcceptanceAtLength.__name__}",
        marked(AcceptanceAtLength.__doc__ or ""),
        _table(AcceptanceAtLength),
    ]
    return compose(
        "Metrics of a training run",
        "Every field of the metrics that `rl-loop train` writes into its output folder.",
        "[metrics.py](../../rl_loop/reports/metrics.py) and "
        "[drafter_metrics.py](../../rl_loop/reports/drafter_metrics.py)",
        *parts,
    )


def _table(metrics: type[BaseModel]) -> str:
    said, properties = _docstrings(metrics), metrics.model_json_schema()["properties"]
    rows = [(code(name), type_of(field, _link), marked(said.get(name, ""))) for name, field in properties.items()]
    return table(("field", "type", "what it says"), rows)


def _docstrings(metrics: type) -> dict[str, str]:
    """The docstring under each field that has one, of the class and of those that it inherits from."""
    found: dict[str, str] = {}
    for part in reversed(metrics.__mro__):
        if part.__module__.startswith("rl_loop"):
            (body,) = ast.parse(inspect.getsource(part)).body
            for field, text in pairwise(body.body):  # type: ignore[attr-defined]
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    found[ast.unparse(field.target)] = ast.literal_eval(text.value)
    return found


def _link(name: str) -> str:
    return f"[{name}](#{name.lower()})"
