"""Profile of the learner's passes by kind of operation, from torch's profiler, on the benchmark's rollouts.

    python deploy/bench/learner_profile.py [--learner.rollouts 128]

A last line says how many tokens the learner computes, and how many tokens the rollouts have.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable

from bench_config import BenchConfig
from learner import examples_of, rollouts_of, train_config
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from drafters.settings import read_command_line
from rl_loop.learner.local_learner import LocalLearner, load_policy
from rl_loop.learner.packing import packed_batches

KINDS = {
    "matrix products": ("mm", "linear"),
    "attention": ("attention",),
    "optimiser": ("adam", "_foreach", "_fused"),
    "conversions and copies": ("copy_", "_to_copy", "clone", "cat", "index", "gather", "scatter", "embedding", "fill"),
}
"""kinds of torch's operations, by parts of their names; all other operations count as elementwise"""


def main() -> None:
    config = read_command_line(BenchConfig, "learner_profile", sys.argv[1:])
    rollouts, train = rollouts_of(config), train_config(config, "bfloat16")
    learner = LocalLearner(train, load_policy(config.learner.model))
    examples = examples_of(rollouts, [scores.logprobs for scores in learner.logprobs(rollouts)])
    learner.train(examples, step=0)
    passes = {
        "logprob": by_kind(lambda: learner.logprobs(rollouts)),
        "train": by_kind(lambda: learner.train(examples, step=0)),
    }
    table = Table(title=f"{len(rollouts)} rollouts, ms per pass", box=SIMPLE)
    for column in ("part", *passes):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part in (*KINDS, "elementwise", "Python and the rest"):
        table.add_row(part, *(f"{1e3 * of[part]:.0f}" for of in passes.values()))
    table.add_row("the pass", *(f"{1e3 * of.total():.0f}" for of in passes.values()))
    batches = packed_batches(rollouts, train.max_tokens_per_microbatch)
    packed, real = sum(len(batch.tokens_S) for batch in batches), sum(map(len, rollouts))
    Console().print(table, f"{len(batches)} micro-batches with {packed} tokens; the rollouts have {real}")


def by_kind(run: Callable[[], object]) -> Counter[str]:
    """Seconds by kind of operation. An operation excludes the operations that it calls, so the sum is the pass."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        began = time.perf_counter()
        run()
        whole = time.perf_counter() - began
    seconds: Counter[str] = Counter()
    for event in profiled.key_averages():
        name = event.key.lower()
        kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "elementwise")
        seconds[kind] += event.self_cpu_time_total / 1e6
    seconds["Python and the rest"] = whole - seconds.total()
    return seconds


if __name__ == "__main__":
    main()
