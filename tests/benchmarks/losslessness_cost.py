"""What the losslessness statistics cost a training step: entropy and variance of surprisal in the log-probability pass.

    python tests/benchmarks/losslessness_cost.py [FOLDER OF A RUN]

Times the learner's scoring of one micro-batch with them and with the log-probabilities alone, alternating, and relates
the difference to the steps of a run (`report/train` of the demo unless another is given).
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch

from drafters.scoring import score_tokens, token_logprobs

VOCABULARY, TOKENS, ROUNDS = 160, 8192, 40


def main(run: Path) -> None:
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logits = 2.0 * torch.randn(TOKENS, VOCABULARY)
    tokens = torch.randint(VOCABULARY, (TOKENS,))
    with_them, without = [], []
    with torch.no_grad():
        for _ in range(ROUNDS):
            began = time.perf_counter()
            score_tokens(logits, tokens)
            between = time.perf_counter()
            token_logprobs(logits, tokens, 1.0)
            with_them.append(between - began)
            without.append(time.perf_counter() - between)
    extra = (statistics.median(with_them) - statistics.median(without)) / TOKENS
    of_step = statistics.median(extra * step["tokens"] / step["seconds"] for step in steps)
    print(f"entropy and variance: {1e6 * extra:.2f} us a token; {of_step:.2%} of a step (median of {len(steps)} steps)")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "report/train"))
