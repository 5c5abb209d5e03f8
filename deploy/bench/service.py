"""Item 4: tokens per second through HTTP and Ray, against vLLM's `LLM.generate` in one process, same settings.

The details say where the difference goes: CPU time by process, and what it takes to write and to read a token's JSON.
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
"""what a command line contains, first match, and whose it is"""


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
                # What an arm follows may matter to it: every other round goes backwards.
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
    """Used so far by this process (the client) and those that it started."""
    own = psutil.Process()
    found = Counter({"client": sum(own.cpu_times()[:2])})
    for process in own.children(recursive=True):
        command = " ".join(process.cmdline())
        whose = next((whose for part, whose in PROCESSES.items() if part in command), "others")
        found[whose] += sum(process.cpu_times()[:2])
    return found


def json_microseconds(groups: Sequence[Group]) -> dict[str, float]:
    """To write the groups as JSON, in the front, and to read them, in the client."""
    began = time.perf_counter()
    lines = [group.model_dump_json() for group in groups]
    written = time.perf_counter()
    for line in lines:
        Group.model_validate_json(line)
    read = time.perf_counter()
    count = tokens(groups)
    return {"write": 1e6 * (written - began) / count, "read": 1e6 * (read - written) / count}
