"""Item 8: the routes of single requests, against POST /v1/rollouts and against stock vLLM's server.

Every arm generates the same number of responses to the same prompts. `/v1/rollouts` gets them in one request, every
other route one request each, all at once. Stock's server has no drafter and none of this project's patches. The details
have the processor time of the processes between the client and vLLM's core, for each request.

While another process keeps one core busy, the engine has one core fewer, as stock's server always has. OpenMP's threads
wait for each other in every operation. Two of them and a busy process share two cores evenly, so both run at once for a
third of the time.
"""

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import aiohttp
from bench_config import BenchConfig
from figures import Figure, figure
from processes import STOP_WITHIN, flags, launched
from service import cpu_seconds
from transformers import AutoTokenizer

from drafters.files.text_lines import json_lines
from drafters.registry import DrafterConfig
from rollout_service.engine.hardware import machine_cores
from rollout_service.evaluation.running import progress, report_console

GOALS = {"stock": 1.0, "rollouts": 0.97}
"""least speed against these arms"""
STREAMED = ", streamed"
PATHS = {
    "rollouts": "/v1/rollouts",
    "completions": "/v1/completions",
    "chat": "/v1/chat/completions",
    "generate": "/inference/v1/generate",
}
BETWEEN = "front", "engine's actor", "Ray"
"""processes between the client and vLLM's core"""


Speeds = dict[str, list[float]]
"""tokens per second in each round, by arm"""


class Case(NamedTuple):
    """Numbers of concurrent requests, and what happens beside them."""

    concurrent: Sequence[int]
    cores: int | None = None
    """cores of the service's engine while another process keeps one core busy; None: nothing is beside it"""

    @property
    def name(self) -> str:
        return "" if self.cores is None else f", one core busy, engine.cores = {self.cores}"


def routes(config: BenchConfig) -> tuple[list[Figure], Any]:
    figures, details = [], {}
    busy_cores = config.engine.cores or max(1, machine_cores() - 1)
    with stock(config) as stock_url:
        for drafter in (DrafterConfig(), config.drafter(config.drafters[0], schedule="auto")):
            for case in (Case(config.routes.concurrent), Case(config.routes.concurrent_when_busy, busy_cores)):
                served = config.served(drafter, **{} if case.cores is None else {"cores": case.cores})
                with launched(*flags(served)) as url:
                    speeds, spent = asyncio.run(_measure(config, f"{drafter.kind}{case.name}", case, url, stock_url))
                figures += _figures(drafter.kind, speeds)
                details[f"{drafter.kind}{case.name}"] = {
                    "tokens_per_second": speeds,
                    "cpu_milliseconds_a_request": {
                        arm: milliseconds(used, idle=spent[f"{arm.partition(': ')[0]}: stock"])
                        for arm, used in spent.items()
                    },
                }
    return figures, details


async def _measure(
    config: BenchConfig, name: str, case: Case, url: str, stock_url: str
) -> tuple[dict[str, Speeds], dict[str, Counter[str]]]:
    """Tokens per second, and processor time by process, of each arm in each round."""
    plan = config.routes
    arms = {"stock": (stock_url, "completions", False), "rollouts": (url, "rollouts", False)}
    arms |= {route: (url, route, False) for route in plan.routes}
    arms |= {f"{route}{STREAMED}": (url, route, True) for route in plan.routes}
    prompts = _prompts(config)
    speeds: dict[str, Speeds] = defaultdict(lambda: defaultdict(list))
    spent: dict[str, Counter[str]] = defaultdict(Counter)  # seconds, by process
    # Idle connections end before a server ends them: stock's does after 5 s, perhaps while the next request is sent.
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2)) as session:
        for where, route, stream in arms.values():  # the first requests wait for imports
            await send(session, where, route, prompts[:8], plan.response_tokens, stream)
        with progress(report_console()) as bar, a_busy_core() if case.cores else nullcontext():
            task = bar.add_task(f"routes, {name}", total=plan.rounds * len(case.concurrent) * len(arms))
            for turn, n in ((turn, n) for turn in range(plan.rounds) for n in case.concurrent):
                waves = 1 if case.cores else max(1, min(plan.waves, plan.most_requests // n))
                for arm, (where, route, stream) in list(arms.items())[:: -1 if turn % 2 else 1]:
                    before, began = cpu_seconds(), time.perf_counter()
                    for wave in range(waves):
                        chosen = [prompts[(wave * n + i) % len(prompts)] for i in range(n)]
                        await send(session, where, route, chosen, plan.response_tokens, stream)
                    seconds = time.perf_counter() - began
                    what = f"{n} concurrent{case.name}"
                    speeds[what][arm].append(waves * n * plan.response_tokens / seconds)
                    used = cpu_seconds() - before
                    spent[f"{what}: {arm}"] += used + Counter({"requests": float(waves * n), "seconds": seconds})
                    bar.advance(task)
    return speeds, spent


def milliseconds(used: Counter[str], idle: Counter[str]) -> dict[str, float]:
    """Processor time of each of BETWEEN for a request, without what the process uses when it has nothing to do: while
    stock's server answered, `idle`."""
    share = used["seconds"] / idle["seconds"]
    each = {name: 1e3 * (used[name] - share * idle[name]) / used["requests"] for name in BETWEEN}
    return {name: round(of, 2) for name, of in (each | {"all": sum(each.values())}).items()}


def _figures(kind: str, speeds: dict[str, Speeds]) -> list[Figure]:
    """`/v1/rollouts` against stock, and the slowest of the other routes, streamed and not, against both. The details
    have every route."""
    figures = []
    for case, of_arm in speeds.items():
        single = [arm for arm in of_arm if arm not in GOALS]
        streamed = [arm for arm in single if arm.endswith(STREAMED)]
        figures += [
            _slowest(arms, other, of_arm, f"drafter {kind}, {case}")
            for arms in (["rollouts"], [arm for arm in single if arm not in streamed], streamed)
            for other in GOALS
            if [other] != arms
        ]
    return figures


def _slowest(arms: Sequence[str], other: str, of_arm: Speeds, where: str) -> Figure:
    """The arm of `arms` that is slowest against `other`."""
    found = []
    for arm in arms:
        ratios = [a / b for a, b in zip(of_arm[arm], of_arm[other], strict=True)]
        found.append(figure("routes", f"{arm} against {other}, {where}", "x", ratios, goal=GOALS[other]))
    return min(found, key=lambda figure: figure.median)


def _prompts(config: BenchConfig) -> list[tuple[str, list[int]]]:
    """Each prompt as the text of a chat message, and as the token ids that the chat template makes of it."""
    tokenizer = AutoTokenizer.from_pretrained(config.policy)
    found = []
    for text in json_lines(config.prompts, lambda line: line["prompt"]):
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        found.append((text, tokenizer.encode(chat, add_special_tokens=False)))
    return found


async def send(
    session: aiohttp.ClientSession,
    url: str,
    route: str,
    prompts: Sequence[tuple[str, list[int]]],
    length: int,
    stream: bool,
) -> None:
    """One response of `length` tokens to each prompt, all at once."""
    if route == "rollouts":
        sampling = {"max_tokens": length, "ignore_eos": True}
        groups = [{"prompt_token_ids": ids, "sampling": sampling} for _, ids in prompts]
        await post(session, url + PATHS[route], {"groups": groups})
        return
    bodies = [body(route, text, ids, length, stream) for text, ids in prompts]
    await asyncio.gather(*(post(session, url + PATHS[route], each) for each in bodies))


def body(route: str, text: str, ids: list[int], length: int, stream: bool) -> dict[str, Any]:
    sampling: dict[str, Any] = {"max_tokens": length, "ignore_eos": True, "temperature": 1.0}
    if route == "generate":
        return {"token_ids": ids, "sampling_params": sampling | {"logprobs": 1}, "stream": stream}
    prompt = {"prompt": ids} if route == "completions" else {"messages": [{"role": "user", "content": text}]}
    return prompt | sampling | {"model": "policy", "stream": stream}


async def post(session: aiohttp.ClientSession, url: str, what: dict[str, Any]) -> None:
    async with session.post(url, json=what) as response:
        answer = await response.read()
        assert response.status == 200, answer


@contextmanager
def stock(config: BenchConfig) -> Iterator[str]:
    """vLLM's own server with the service's settings of the engine, and without this project's plugin."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    engine = config.engine
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", config.policy,
        "--served-model-name", "policy", "--host", "127.0.0.1", "--port", str(port), "--dtype", engine.dtype,
        "--max-model-len", str(engine.max_model_len), "--max-num-seqs", str(engine.max_num_seqs),
        "--generation-config", "vllm", "--enforce-eager", "--disable-uvicorn-access-log",
        "--kv-cache-memory-bytes", str(int((engine.kv_cache_gib or 1) * 2**30)),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, env=os.environ | {"VLLM_PLUGINS": ""}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        asyncio.run(_healthy(f"http://127.0.0.1:{port}", process))
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(STOP_WITHIN)


async def _healthy(url: str, process: "subprocess.Popen[bytes]") -> None:
    async with aiohttp.ClientSession() as session:
        while process.poll() is None:
            try:
                async with session.get(f"{url}/health") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                await asyncio.sleep(0.5)
    raise RuntimeError("stock vLLM's server did not start")


@contextmanager
def a_busy_core() -> Iterator[None]:
    """Another process that keeps one core busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()
