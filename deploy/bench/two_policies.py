"""The learner's passes on two policies, in turns: tokens a second of the second one, relative to the first.

python deploy/bench/two_policies.py deploy/demo/models/policy deploy/demo/models/latent/policy
"""

import sys
import time
from collections import defaultdict

from bench_config import BenchConfig, LearnerSpeed
from figures import figure
from learner import examples_of, rollouts_of, train_config
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from rl_loop.learner.local_learner import LocalLearner, load_policy

DTYPES = ("float32", "bfloat16")
"""of matrix products; weights are float32"""
ROLLOUTS, ROUNDS = 128, 6


def main() -> None:
    models = sys.argv[1:]
    if len(models) != 2:
        sys.exit("two_policies: give the folders of two policies")
    configs = [BenchConfig(learner=LearnerSpeed(model=model, rollouts=ROLLOUTS)) for model in models]
    rollouts = rollouts_of(configs[0])
    tokens = sum(map(len, rollouts))
    table = Table(title=f"{ROLLOUTS} rollouts, {tokens} tokens, {ROUNDS} rounds", box=SIMPLE)
    for column in ("pass", "dtype", "first, tokens/s", "second, tokens/s", "ratio", "95 % interval"):
        table.add_column(column, justify="left" if column in ("pass", "dtype") else "right")
    for dtype in DTYPES:
        learners = [LocalLearner(train_config(c, dtype), load_policy(c.learner.model)) for c in configs]
        seconds = defaultdict[str, list[list[float]]](lambda: [[], []])
        for _ in range(1 + ROUNDS):
            for which, learner in enumerate(learners):
                began = time.perf_counter()
                scores = learner.logprobs(rollouts)
                between = time.perf_counter()
                learner.train(examples_of(rollouts, [score.logprobs for score in scores]), step=0)
                seconds["log-probabilities"][which].append(between - began)
                seconds["training"][which].append(time.perf_counter() - between)
        for name, (first, second) in seconds.items():
            ratios = [a / b for a, b in zip(first[1:], second[1:], strict=True)]  # the first round warms up
            ratio = figure("learner", name, "x", ratios)
            speeds = (f"{tokens / min(of):.0f}" for of in (first, second))
            low, high = ratio.interval
            table.add_row(name, dtype, *speeds, f"{ratio.median:.2f}", f"{low:.2f} to {high:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
