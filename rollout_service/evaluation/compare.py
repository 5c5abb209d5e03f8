"""`rollout-service compare`: the same prompts, seeds and response lengths through every drafter, in alternating turns.

for each set of engines that fits:
    start them together
    for each concurrency, for each round:     generate a share of the responses in every row of these engines
    stop them
recompute every token's distribution, and report
"""

import asyncio
import sys
import time
from collections.abc import Iterator, Sequence

import httpx
import ray
from rich.console import Console
from rich.progress import Progress

from drafters.devices import choose_device
from drafters.files.durable import check_folder
from drafters.files.model_folder import resolve_model
from drafters.runners import Runner
from drafters.scoring import SurprisalSums, join_scores
from rollout_service.client import RolloutError
from rollout_service.engine.hardware import resolve_device, runner_of
from rollout_service.evaluation.arms import Arm, EndpointArm, EngineArm, fetch_models, name_of
from rollout_service.evaluation.compare_config import CompareConfig
from rollout_service.evaluation.cut import Cut
from rollout_service.evaluation.exact_policy import Recomputation, Response
from rollout_service.evaluation.prompts import read_prompts
from rollout_service.evaluation.report import write_report
from rollout_service.evaluation.rows import Cell, Row
from rollout_service.evaluation.running import generate_all, progress, report_console, started_engines
from rollout_service.fleet.member import FleetError
from rollout_service.fleet.resources import check_machine
from rollout_service.protocol import GroupRequest, Sampling

WARM_UP_TOKENS = 16


def compare(config: CompareConfig) -> list[Row]:
    """Measure, print, and write compare.json, costs.json, compare.md and plots to `config.output`. Exits with 1 when an
    engine fails, and after writing when a row is not lossless."""
    console = report_console()
    try:
        cells = asyncio.run(measure(config, console))
    except httpx.HTTPError as error:
        sys.exit(f"rollout-service compare: endpoint: {config.endpoint}: {str(error) or type(error).__name__}")
    except (FleetError, RolloutError, ValueError, OSError) as error:
        sys.exit(f"rollout-service compare: {error}")
    except KeyboardInterrupt:
        sys.exit("rollout-service compare: interrupted; nothing was written")
    finally:
        ray.shutdown()
    rows = judge(config, cells, console)
    write_report(rows, config, console)
    if not all(row.is_lossless for row in rows):
        sys.exit(1)
    return rows


async def measure(config: CompareConfig, console: Console) -> list[Cell]:
    check_folder(config.output, "output")
    choose_device(config.recomputation.device, "recomputation.device")
    device = resolve_device(config.engine.device)
    runner = runner_of(device)
    drafters = config.arms(runner)
    at_once = config.engines_at_once or (1 if device == "cuda" else len(drafters))
    if config.endpoint is None:
        check_machine(config.service(drafters[0]), device, turns=min(at_once, len(drafters)))
        fetch_models(config.model, drafters, device)
    requests = list(grid_requests(config))
    with progress(console) as bar:
        if config.endpoint is not None:
            token = config.token.get_secret_value() if config.token else None
            arm = await EndpointArm.connect(config.endpoint, token, config.ca_file)
            try:
                return await take_turns(config, [arm], runner, requests, bar)
            finally:
                await arm.stop()
        cells: list[Cell] = []
        for start in range(0, len(drafters), at_once):
            arms = [EngineArm(config.service(drafter)) for drafter in drafters[start : start + at_once]]
            async with started_engines(arms, bar):
                cells += await take_turns(config, arms, runner, requests, bar)
        return cells


async def take_turns(
    config: CompareConfig, arms: Sequence[Arm], runner: Runner, requests: list[GroupRequest], bar: Progress
) -> list[Cell]:
    """Measure every row of these arms. In each round every row generates its share of `requests`."""
    turns = [
        (arm, Cell(drafter, concurrency, arm.dtype))
        for concurrency in config.concurrency
        for arm in arms
        for drafter in (config.ways(arm.drafter, runner) if config.endpoint is None else [arm.drafter])
    ]
    task = bar.add_task("generating", total=len(turns) * len(requests))
    short = [
        r.model_copy(update={"sampling": r.sampling.model_copy(update={"max_tokens": WARM_UP_TOKENS})})
        for r in requests
    ]
    for arm in arms:  # the first steps compile and allocate, so they are not measured
        await generate_all(arm, short[: config.concurrency[-1]], config.concurrency[-1], lambda: None)
    for concurrency in config.concurrency:
        for share in range(config.rounds):
            batch = requests[share :: config.rounds]
            for arm, cell in turns:
                if cell.concurrency == concurrency:
                    bar.update(task, description=f"{name_of(arm.drafter)}, {concurrency} at a time")
                    cell.ran = await arm.draft_as(cell.drafter)
                    began = time.perf_counter()
                    groups = await generate_all(arm, batch, concurrency, lambda: bar.advance(task))
                    cell.add_round(groups, time.perf_counter() - began)
    return [cell for _, cell in turns]


def grid_requests(config: CompareConfig) -> Iterator[GroupRequest]:
    """Enough requests for a row, over the prompts in turn. Response i has the same prompt and seed in every row."""
    prompts = read_prompts(config.model, config.prompts)
    count = -(-config.tokens // config.response_tokens)
    for i in range(count):
        yield GroupRequest(
            prompt_token_ids=prompts[i % len(prompts)],
            sampling=Sampling(
                temperature=config.temperature, top_p=config.top_p, top_k=config.top_k,
                max_tokens=config.response_tokens, ignore_eos=True, seed=(config.seed + i) % 2**31,
            ),
        )  # fmt: skip


def judge(config: CompareConfig, cells: list[Cell], console: Console) -> list[Row]:
    """Rows with their z-scores and their speeds relative to `none` at the same concurrency."""
    recomputation = Recomputation(resolve_model(config.model), config.recomputation)
    cut = Cut(config.temperature, config.top_p, config.top_k)
    baselines = {cell.concurrency: cell for cell in cells if not cell.drafter.drafts}
    rows = []
    with progress(console) as bar:
        task = bar.add_task("recomputing distributions", total=sum(sum(cell.tokens) for cell in cells))
        for cell in cells:
            responses = [Response(g.prompt_token_ids, c.token_ids) for g in cell.groups for c in g.completions]
            scores = recomputation.scores(responses, cut, lambda tokens: bar.advance(task, tokens))
            rows.append(cell.row(baselines.get(cell.concurrency), SurprisalSums.of(join_scores(scores)).z))
    return rows
