"""Item 4: tokens per second through HTTP and Ray, against vLLM's `LLM.generate` in one process, same settings."""

import time
from typing import Any

from bench_config import BenchConfig
from figures import Figure, figure
from processes import bare_engine, flags, launched
from rollout_speed import fixed_length, tokens

from drafters.drafter import DrafterConfig
from rollout_service.client import RolloutClient

GOAL = 0.97


def service(config: BenchConfig) -> tuple[list[Figure], Any]:
    plan = config.service
    drafters = [DrafterConfig(kind="none"), config.drafter(config.drafters[0], draft_tokens=3, schedule="fixed")]
    requests = fixed_length(config, plan.streams, plan.response_tokens)
    prompts = [request.prompt_token_ids for request in requests]
    figures, details = [], {}
    for drafter in drafters:
        served = config.served(drafter, max_num_seqs=plan.streams)
        speeds: dict[str, list[float]] = {"service": [], "bare": []}
        with launched(*flags(served)) as url, bare_engine(served) as bare, RolloutClient(url) as client:
            for round in range(1 + plan.rounds):
                began = time.perf_counter()
                groups = list(client.rollouts(requests))
                seconds = time.perf_counter() - began
                answer = bare.ask(prompts=prompts, tokens=plan.response_tokens)
                if round > 0:  # the first warms up
                    speeds["service"].append(tokens(groups) / seconds)
                    speeds["bare"].append(answer["tokens"] / answer["seconds"])
        ratios = [a / b for a, b in zip(speeds["service"], speeds["bare"], strict=True)]
        what = f"drafter {drafter.kind}, {plan.streams} streams"
        figures.append(figure("service", what, "x", ratios, goal=GOAL))
        details[drafter.kind] = speeds
    return figures, details
