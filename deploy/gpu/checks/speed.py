"""Stage `speed`: tokens per second of the padded policy, by streams and draft length, on the demo's prompts.

The acceptance is that of the demo's policy, and a step costs as much as with 3.6 B parameters. Drafts are greedy,
unless `DRAFTS=probabilistic` is set in the environment.
"""

import os
import time
from typing import NamedTuple

from common import DEVICE, PADDED, ROOT, SCALE, say
from configured import service_config, started
from vllm import LLM, SamplingParams

from drafters.files.text_lines import json_lines

DRAFT_TOKENS = 5
STREAMS = [streams for streams in (1, 4, 16, 64, 256) if streams <= 256 // SCALE]
SLOTS = max(8, *STREAMS)
TURNS = 3
"""turns through all draft lengths; the first one warms up"""


class Speed(NamedTuple):
    tokens_a_second: float
    acceptance_length: float


def run(kind: str) -> None:
    drafter = {"draft_tokens": DRAFT_TOKENS, "draft_sampling": os.environ.get("DRAFTS", "greedy")}
    engine = {
        "dtype": "bfloat16",
        "enforce_eager": DEVICE != "cuda",
        "max_num_seqs": SLOTS,
        "kv_cache_gib": 8 if DEVICE == "cuda" else 1,
    }
    if DEVICE == "cuda":
        engine["gpu_memory_utilization"] = 0.6
    config = service_config(kind, PADDED, drafter={} if kind == "none" else drafter, engine=engine)
    llm = started(config, "every")
    say("started")
    core = llm.llm_engine.engine_core.engine_core
    prompts = [problem["prompt"] for problem in json_lines(ROOT / "deploy" / "demo" / "prompts.jsonl")]
    for streams in STREAMS:
        speeds: dict[int, list[Speed]] = {}
        for turn in range(TURNS):
            for length in range(DRAFT_TOKENS + 1) if kind != "none" else (0,):
                if kind != "none":
                    core.set_draft_lengths([(1, SLOTS, length)])
                measured = speed(llm, prompts, streams)
                if turn > 0:
                    speeds.setdefault(length, []).append(measured)
        say(f"{kind}, {streams} streams:", summary(speeds))


def speed(llm: LLM, prompts: list[str], streams: int) -> Speed:
    """Speed with `streams` responses of 72 tokens at a time, and at least four in total."""
    params = SamplingParams(temperature=1.0, max_tokens=72, ignore_eos=True, logprobs=0, flat_logprobs=True)
    done = []
    began = time.perf_counter()
    for first in range(0, max(streams, 4), streams):
        batch = [prompts[i % len(prompts)] for i in range(first, first + streams)]
        done += [completion for output in llm.generate(batch, params, use_tqdm=False) for completion in output.outputs]
    seconds = time.perf_counter() - began
    histograms = [c.spec_decode_metrics.histogram for c in done if c.spec_decode_metrics]
    accepted = sum(j * steps for histogram in histograms for j, steps in enumerate(histogram))
    length = 1 + accepted / max(1, sum(map(sum, histograms)))
    return Speed(sum(len(c.token_ids) for c in done) / seconds, length)


def summary(speeds: dict[int, list[Speed]]) -> str:
    """Means by draft length, and their ratios to the speed without drafts."""
    means = {k: sum(s.tokens_a_second for s in turns) / len(turns) for k, turns in speeds.items()}
    return "; ".join(
        f"k = {k} {mean:.0f} tokens/s ({mean / means[0]:.2f} times, acceptance length "
        f"{speeds[k][-1].acceptance_length:.2f})"
        for k, mean in means.items()
    )
