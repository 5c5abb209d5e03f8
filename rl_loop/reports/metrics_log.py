"""MetricsLog: a run's metrics on disk, as JSON lines and, on request, as TensorBoard events."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel

from drafters.files.durable import make_folders, replacing
from drafters.files.text_lines import byte_lines
from rl_loop.reports.drafter_metrics import DrafterMetrics
from rl_loop.reports.metrics import FIELDS_WITHOUT_A_CURVE, EvaluationMetrics, Stage, StepMetrics

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

MetricsT = TypeVar("MetricsT", bound=BaseModel)

STEPS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
DRAFTER_FILE = "drafter.jsonl"


class MetricsLog:
    """`steps`, `evaluations` and `drafter` (one line per step) of the whole run, including those before a resume.

    `step` is the number of finished steps in the state that the run resumes from. Later lines are dropped, since those
    steps are trained again.
    """

    def __init__(self, output: Path, step: int, tensorboard: bool = False):
        make_folders(output)
        self.output = output
        self.steps = [m for m in _read(output / STEPS_FILE, StepMetrics) if m.step <= step]
        self.evaluations = [m for m in _read(output / EVALUATIONS_FILE, EvaluationMetrics) if m.step < step]
        self.drafter = [m for m in _read(output / DRAFTER_FILE, DrafterMetrics) if m.step <= step]
        _write(output / STEPS_FILE, self.steps)
        _write(output / DRAFTER_FILE, self.drafter)
        _write(output / EVALUATIONS_FILE, self.evaluations)
        self.events = _event_writer(output / "tensorboard", step + 1) if tensorboard else None

    def step(self, metrics: StepMetrics) -> None:
        self.steps.append(metrics)
        _append(self.output / STEPS_FILE, metrics)
        fields = metrics.model_dump(exclude=FIELDS_WITHOUT_A_CURVE, exclude_none=True)
        self._events("train", metrics.step, fields)
        self._events("seconds", metrics.step, metrics.stages)
        self._events("router", metrics.step, metrics.router_curves())

    def drafter_step(self, metrics: DrafterMetrics) -> None:
        self.drafter.append(metrics)
        _append(self.output / DRAFTER_FILE, metrics)
        self._events("drafter", metrics.step, metrics.scalars())

    def evaluation(self, metrics: EvaluationMetrics) -> None:
        self.evaluations.append(metrics)
        _append(self.output / EVALUATIONS_FILE, metrics)
        self._events("held_out", metrics.step, metrics.model_dump(exclude={"step"}, exclude_none=True))

    def close(self) -> None:
        if self.events is not None:
            self.events.close()

    def _events(self, prefix: str, step: int, values: dict[str, float] | dict[Stage, float]) -> None:
        if self.events is not None:
            for name, value in values.items():
                self.events.add_scalar(f"{prefix}/{name}", value, step)


def _event_writer(folder: Path, first_step: int) -> "SummaryWriter":
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    return SummaryWriter(str(folder), purge_step=first_step)


def _read(file: Path, of: type[MetricsT]) -> list[MetricsT]:
    lines = byte_lines(file) if file.is_file() else []
    metrics = []
    with contextlib.suppress(ValueError):  # a killed run may leave an incomplete last line
        for line in lines:
            metrics.append(of.model_validate_json(line))
    return metrics


def _write(file: Path, metrics: list[MetricsT]) -> None:
    with replacing(file) as partial:
        partial.write_text("".join(m.model_dump_json() + "\n" for m in metrics), encoding="utf-8")


def _append(file: Path, metrics: BaseModel) -> None:
    with file.open("a", encoding="utf-8") as lines:
        lines.write(metrics.model_dump_json() + "\n")
