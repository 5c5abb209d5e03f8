"""Prompt tokens found in the prefix cache, in conversations of several turns: by session against at random.

    python tests/benchmarks/prefix_routing.py [--sessions 24] [--turns 6] [--rounds 3] [--output FOLDER]

Two engines of one core serve the demo's policy. Each conversation sends its next turn when the one before has ended:
the prompt so far, the response, and new tokens. Both ways of routing take turns in one run, and each round begins with
empty caches and new conversations. `random` is a choice of this script, not of the service. The script writes
figures.json and figures.md.
"""

import argparse
import asyncio
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from rollout_service.config import ServiceConfig
from rollout_service.fleet.fleet import Fleet
from rollout_service.protocol import GroupRequest, Sampling

MODEL = Path(__file__).resolve().parents[2] / "deploy" / "demo" / "models" / "policy"
VOCABULARY, CONTEXT = 150, 512
BLOCK = 32
"""tokens of a block of the cache; a CPU's default, 128, is a quarter of the demo's context"""
FIRST, MORE, RESPONSE = 96, 24, 24
"""tokens of the first prompt, of what each later turn adds, and of a response"""
COUNTERS = {"vllm:prefix_cache_queries": "asked", "vllm:prefix_cache_hits": "found"}


class Round(NamedTuple):
    asked: float
    """prompt tokens"""
    found: float
    """of them, those whose keys and values the engine had"""
    seconds: float


def service() -> ServiceConfig:
    vllm = {"enable_prefix_caching": True, "block_size": BLOCK}
    engine = {
        "device": "cpu",
        "cores": 1,
        "dtype": "float32",
        "max_model_len": CONTEXT,
        "kv_cache_gib": 0.5,
        "vllm": vllm,
    }
    return ServiceConfig(model=str(MODEL), engines=2, engine=engine)


async def counts(fleet: Fleet) -> dict[str, float]:
    """The sums over the engines of vLLM's counters."""
    sums = dict.fromkeys(COUNTERS.values(), 0.0)
    for text in (await fleet.metrics()).values():
        for family in text_string_to_metric_families(text):
            if family.name in COUNTERS:
                sums[COUNTERS[family.name]] += sum(s.value for s in family.samples if s.name.endswith("_total"))
    return sums


async def conversation(fleet: Fleet, name: str, turns: int, chance: random.Random) -> None:
    def tokens(count: int) -> list[int]:
        return [chance.randrange(VOCABULARY) for _ in range(count)]

    prompt = tokens(FIRST)
    sampling = Sampling(max_tokens=RESPONSE, ignore_eos=True)
    for _ in range(turns):
        group = await fleet.generate(GroupRequest(id=name, prompt_token_ids=prompt, session=name, sampling=sampling))
        prompt = [*prompt, *group.completions[0].token_ids, *tokens(MORE)]


async def one_round(fleet: Fleet, name: str, sessions: int, turns: int) -> Round:
    if not await fleet.controls.reset_prefix_cache(False, False):
        raise RuntimeError("a cache could not be emptied")
    before, began = await counts(fleet), time.monotonic()
    talks = (conversation(fleet, f"{name}-{i}", turns, random.Random(f"{name}-{i}")) for i in range(sessions))
    await asyncio.gather(*talks)
    seconds, after = time.monotonic() - began, await counts(fleet)
    return Round(**{what: after[what] - before[what] for what in before}, seconds=seconds)


async def measure(sessions: int, turns: int, rounds: int) -> dict[str, list[Round]]:
    fleet, chance = Fleet(service()), random.Random(0)
    await fleet.start()
    by_session: Callable = fleet.placement.choose
    ways = {"session": by_session, "random": lambda members, session, tokens: chance.choice(members)}
    measured: dict[str, list[Round]] = {way: [] for way in ways}
    try:
        await one_round(fleet, "warm-up", sessions, 1)
        for i in range(rounds):
            for way, choose in ways.items():
                fleet.placement.choose = choose  # type: ignore[method-assign]
                measured[way].append(await one_round(fleet, f"{way}-{i}", sessions, turns))
                print(f"round {i}, {way}: {measured[way][-1]}", flush=True)
    finally:
        await fleet.stop()
    return measured


def most_that_can_be_found(turns: int) -> float:
    """The share that one engine with an endless cache would find. It holds whole blocks."""
    lengths = [FIRST + turn * (RESPONSE + MORE) for turn in range(turns)]
    known = [length + RESPONSE - 1 for length in lengths[:-1]]  # the last token of a response was never read
    return sum(tokens // BLOCK * BLOCK for tokens in known) / sum(lengths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sessions", type=int, default=24)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("report/prefix_routing"))
    chosen = parser.parse_args()
    longest = FIRST + (chosen.turns - 1) * (RESPONSE + MORE) + RESPONSE
    if longest > CONTEXT:
        parser.error(f"--turns: {chosen.turns} turns have {longest} tokens, more than the context of {CONTEXT}")
    measured = asyncio.run(measure(chosen.sessions, chosen.turns, chosen.rounds))
    rows = ["| routing | prompt tokens | found in the cache | share | seconds a round |", "|---|---|---|---|---|"]
    for way, done in measured.items():
        asked, found = sum(r.asked for r in done), sum(r.found for r in done)
        seconds = sum(r.seconds for r in done) / len(done)
        rows.append(f"| {way} | {asked:.0f} | {found:.0f} | {found / asked:.1%} | {seconds:.2f} |")
    table = "\n".join([*rows, "", f"At most {most_that_can_be_found(chosen.turns):.1%} could be found."]) + "\n"
    chosen.output.mkdir(parents=True, exist_ok=True)
    figures = {way: [r._asdict() for r in done] for way, done in measured.items()}
    (chosen.output / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    (chosen.output / "figures.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
