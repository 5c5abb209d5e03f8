"""Reporter: a run's progress, as a live table in a terminal, and otherwise as one line per step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from rl_loop.reports.drafter_metrics import DrafterMetrics
from rl_loop.reports.metrics import STAGES, EvaluationMetrics, StepMetrics
from rl_loop.reports.metrics_log import MetricsLog

ROWS = 15

COLUMNS: dict[str, Callable[[StepMetrics], str]] = {
    "step": lambda m: str(m.step),
    "version": lambda m: str(m.version),
    "reward": lambda m: f"{m.reward:.3f}",
    "right": lambda m: f"{m.pass_rate:.1%}",
    "length": lambda m: f"{m.response_length:.1f}",
    "entropy": lambda m: f"{m.entropy:.3f}",
    "grad": lambda m: f"{m.grad_norm:.2f}",
    "KL": lambda m: f"{m.kl:.1e}",
    "max Δlogp": lambda m: f"{m.logprob_difference_max:.1e}",
    "z": lambda m: f"{m.z:+.2f}",
    "accept": lambda m: "–" if m.acceptance_length is None else f"{m.acceptance_length:.2f}",
    "stale": lambda m: f"{m.staleness_mean:.2f}",
    "tok/s": lambda m: f"{m.tokens_per_second:.0f}",
    **{stage: lambda m, stage=stage: f"{m.stages[stage]:.1f}" for stage in STAGES},  # type: ignore[misc]
}


class Reporter:
    """Writes every step and evaluation to the log, and shows them. A context manager, which ends the live table."""

    def __init__(self, log: MetricsLog, steps: int, console: Console | None = None):
        self.log, self.steps = log, steps
        self.console = console or Console()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
        )
        self.of_steps = self.progress.add_task("steps", total=steps, completed=len(log.steps))
        self.of_groups = self.progress.add_task("", total=None)
        self.live = Live(console=self.console, get_renderable=self._screen) if self.console.is_terminal else None

    def __enter__(self) -> "Reporter":
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.update(self.of_groups, visible=False)
        if self.live is not None:
            self.live.stop()
        self.log.close()

    def stage(self, name: str) -> None:
        """Show what the run is doing now."""
        self.progress.reset(self.of_groups, total=None, description=name)

    @contextmanager
    def groups(self, total: int) -> Iterator[Callable[[], None]]:
        """A progress bar of generated groups. Call the function that it yields once for each group that arrives."""
        self.progress.update(self.of_groups, total=total, completed=0)
        yield lambda: self.progress.advance(self.of_groups)

    def step(self, metrics: StepMetrics) -> None:
        self.log.step(metrics)
        self.progress.update(self.of_steps, completed=metrics.step)
        if self.live is None:
            shown = "  ".join(f"{name} {show(metrics)}" for name, show in COLUMNS.items() if name not in STAGES)
            seconds = " ".join(f"{stage} {metrics.stages[stage]:.1f}" for stage in STAGES)
            self.console.print(f"{shown}  seconds: {seconds}", soft_wrap=True, highlight=False)

    def drafter(self, metrics: DrafterMetrics | None) -> None:
        if metrics is not None:
            self.log.drafter_step(metrics)

    def evaluation(self, metrics: EvaluationMetrics) -> None:
        self.log.evaluation(metrics)
        self.console.print(
            f"held out, after {metrics.step} steps: reward {metrics.reward:.3f}  right {metrics.pass_rate:.1%}  "
            f"length {metrics.response_length:.1f}  ({metrics.seconds:.1f} s)",
            highlight=False,
        )

    def alarm(self, message: str) -> None:
        self.console.print(f"[bold red]{message}[/]", highlight=False)

    def _screen(self) -> Group:
        return Group(step_table(self.log.steps[-ROWS:]), self.progress)


def step_table(steps: list[StepMetrics]) -> Table:
    table = Table(box=None, padding=(0, 1), caption="stages in seconds", caption_justify="right")
    for name in COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for metrics in steps:
        table.add_row(*(show(metrics) for show in COLUMNS.values()))
    return table
