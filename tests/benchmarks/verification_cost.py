"""Cost of verification relative to one float32 softmax over the same logits: vocabulary 151,936, 32 requests, k = 3.

    python tests/benchmarks/verification_cost.py

The arms take turns, and the medians over rounds are printed.
"""

import statistics
import time
from collections.abc import Callable

import torch

from drafters.verification import Drafts, target_distribution, uniforms, verify

VOCABULARY, REQUESTS, K, ROUNDS = 151_936, 32, 3, 15


def main() -> None:
    torch.manual_seed(0)
    count = REQUESTS * K
    logits = 3.0 * torch.randn(count, VOCABULARY)
    probs = (logits + torch.randn(count, VOCABULARY)).softmax(1)
    drafted = torch.multinomial(probs, 1).squeeze(1)
    lengths, bonus = torch.full((REQUESTS,), K), torch.zeros(REQUESTS, dtype=torch.long)

    def verification(method: str, draft_probs: torch.Tensor | None) -> Callable[[], torch.Tensor]:
        drafts = Drafts(drafted, lengths, draft_probs)
        return lambda: verify(target_distribution(logits), drafts, bonus, uniforms(REQUESTS, {}), method)  # type: ignore[arg-type]

    arms: dict[str, Callable[[], torch.Tensor]] = {
        "softmax": lambda: logits.softmax(1),
        "standard": verification("standard", probs),
        "standard, deterministic drafts": verification("standard", None),
        "block": verification("block", probs),
        "block, deterministic drafts": verification("block", None),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for round_ in range(ROUNDS + 2):
        for name, run in arms.items():
            began = time.perf_counter()
            run()
            if round_ >= 2:  # the first rounds allocate memory
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(of) for name, of in seconds.items()}
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, median in medians.items():
        print(f"{name:32} {1e3 * median:7.1f} ms   {median / medians['softmax']:.2f} x softmax")


if __name__ == "__main__":
    main()
