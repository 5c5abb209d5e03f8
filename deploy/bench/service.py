"""Item 4: tokens per second over HTTP and Ray, relative to vLLM's `LLM.generate` in one process with equal settings.

The details have the CPU time of each process, and the time to write and to read the JSON of a token.
"""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import psutil
from bench_config import BenchConfig
from figures import Figure, figure
from processes import bare_engine, flags, launched
from rollout_speed import fixed_length, tokens

from drafters.registry import DrafterConfig
from rollout_service.client import RolloutClient
from rollout_service.protocol import Group

GOAL = 0.97
PROCESSES = {
    "bare_engine": "bare engine",
    "VLLM::EngineCore": "engine core",
    "ray::Engine": "engine's actor",
    "rollout-service launch": "front",
    "ray::": "Ray",
    "/ray/": "Ray",
}
"""part of a command line, and the name of the process; the first match counts"""


def service(config: BenchConfig) -> tuple[list[Figure], Any]:
    plan = config.service
    drafters = [DrafterConfig(), config.drafter(config.drafters[0], draft_tokens=3, schedule="fixed")]
    requests = fixed_length(config, plan.streams * plan.responses_per_stream, plan.response_tokens)
    prompts = [request.prompt_token_ids for request in requests]
    figures, details = [], {}
    for drafter in drafters:
        served = config.served(drafter, max_num_seqs=plan.streams)
        speeds: dict[str, list[float]] = {"service": [], "bare": []}
        spent: Counter[str] = Counter()
        with launched(*flags(served)) as url, bare_engine(served) as bare, RolloutClient(url) as client:
            # Both warm up.
            list(client.rollouts(requests))
            bare.ask(prompts=prompts, tokens=plan.response_tokens)
            for round in range(plan.rounds):
                # The arm before may affect the next one, so every second round has the opposite order.
                for arm in ("service", "bare")[:: -1 if round % 2 else 1]:
                    before, began = cpu_seconds(), time.perf_counter()
                    if arm == "service":
                        groups = list(client.rollouts(requests))
                        count, seconds = tokens(groups), time.perf_counter() - began
                    else:
                        answer = bare.ask(prompts=prompts, tokens=plan.response_tokens)
                        count, seconds = answer["tokens"], answer["seconds"]
                    used = cpu_seconds() - before
                    speeds[arm].append(count / seconds)
                    spent += used if arm == "service" else Counter({"bare engine": used["bare engine"]})
        ratios = [a / b for a, b in zip(speeds["service"], speeds["bare"], strict=True)]
        what = f"drafter {drafter.kind}, {plan.streams} streams"
        figures.append(figure("service", what, "x", ratios, goal=GOAL))
        details[drafter.kind] = {
            **speeds,
            "cpu_microseconds_a_token": {name: 1e6 * of / (plan.rounds * count) for name, of in spent.most_common()},
            "json_microseconds_a_token": json_microseconds(groups),
        }
    return figures, details


def cpu_seconds() -> Counter[str]:
    """CPU seconds so far of this process (the client) and of every process below it."""
    own = psutil.Process()
    found = Counter({"client": sum(own.cpu_times()[:2])})
    for process in own.children(recursive=True):
        command = " ".join(process.cmdline())
        whose = next((whose for part, whose in PROCESSES.items() if part in command), "others")
        found[whose] += sum(process.cpu_times()[:2])
    return found


def json_microseconds(groups: Sequence[Group]) -> dict[str, float]:
    """Microseconds per token to write the groups as JSON, as the front does, and to read them, as the client does."""
    began = time.perf_counter()
    lines = [group.model_dump_json() for group in groups]
    written = time.perf_counter()
    for line in lines:
        Group.model_validate_json(line)
    read = time.perf_counter()
    count = tokens(groups)
    return {"write": 1e6 * (written - began) / count, "read": 1e6 * (read - written) / count}
