"""Steps that every measurement shares: start engines together, keep requests in flight, show progress."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from rollout_service.evaluation.arms import Arm, EngineArm, engine_name
from rollout_service.protocol import Group, GroupRequest

TABLE_WIDTH = 150


def report_console() -> Console:
    """A console as wide as the tables need, even if the output goes to a file or a narrow window."""
    return Console(width=max(Console().width, TABLE_WIDTH))


@contextmanager
def progress(console: Console) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        yield bar


@asynccontextmanager
async def started_engines(arms: Sequence[EngineArm], bar: Progress) -> AsyncIterator[None]:
    """All engines are in service inside this context, and none is left after it."""

    async def start(arm: EngineArm, task: TaskID) -> None:
        await arm.fleet.start()
        bar.advance(task)

    try:
        name = engine_name(arms[0]) if len(arms) == 1 else "engines"
        task = bar.add_task(f"starting {name}", total=len(arms))
        await asyncio.gather(*(start(arm, task) for arm in arms))
        yield
    finally:
        await asyncio.gather(*(arm.stop() for arm in arms))


async def generate_all(
    arm: Arm, requests: Sequence[GroupRequest], concurrency: int, done: Callable[[], None]
) -> list[Group]:
    """Generate every request, at most `concurrency` at a time. The next one begins when one ends."""
    left = iter(requests)
    groups: list[Group] = []

    async def stream() -> None:
        for request in left:
            groups.append(await arm.generate(request))
            done()

    await asyncio.gather(*(stream() for _ in range(concurrency)))
    return groups
