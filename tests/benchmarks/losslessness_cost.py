"""Cost of the losslessness statistics in a training step.

    python tests/benchmarks/losslessness_cost.py [FOLDER OF A RUN]

The script times the learner's scoring of one micro-batch in three ways, in turn: log-probabilities alone; with entropy,
which is reported in any case; and also with the variance of surprisal and the sums of z. It relates the differences to
the steps of a run, by default the demo's `report/train`.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from drafters.files.text_lines import json_lines
from drafters.scoring import SurprisalSums, score_tokens, token_logprobs

VOCABULARY, TOKENS, ROUNDS = 160, 8192, 60


def with_entropy(logits_NV: Tensor, tokens_N: Tensor) -> tuple[Tensor, Tensor]:
    logprobs_NV = logits_NV.float().log_softmax(1)
    return logprobs_NV.gather(1, tokens_N[:, None]), -(logprobs_NV.exp() * logprobs_NV).sum(1)


@torch.no_grad()
def main(run: Path) -> None:
    steps = list(json_lines(run / "metrics.jsonl"))
    logits, tokens = 2.0 * torch.randn(TOKENS, VOCABULARY), torch.randint(VOCABULARY, (TOKENS,))
    arms: dict[str, Callable[[], object]] = {
        "log-probabilities": lambda: token_logprobs(logits, tokens, 1.0),
        "with entropy": lambda: with_entropy(logits, tokens),
        "with variance and z": lambda: SurprisalSums.of(score_tokens(logits, tokens)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(ROUNDS):
        for name, compute in arms.items():
            began = time.perf_counter()
            compute()
            seconds[name].append(time.perf_counter() - began)
    median = {name: statistics.median(of) / TOKENS for name, of in seconds.items()}
    token_share = statistics.median(step["tokens"] / step["seconds"] for step in steps)
    for name, of_token in median.items():
        extra = of_token - median["log-probabilities"]
        print(f"{name:22} {1e6 * of_token:6.2f} us a token; {extra * token_share:6.2%} of a step beyond the first")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "report/train"))
