"""Stage `lengths`: time of a step by draft length, in an engine with CUDA graphs for some or all lengths."""

import time

import torch
from common import DEVICE, say
from configured import service_config, started
from vllm import LLM, SamplingParams

DRAFT_TOKENS = 3
BATCHES = (1, 32)


def run(kind: str, ranges: str) -> None:
    drafter = {"draft_tokens": DRAFT_TOKENS}
    engine = {"dtype": "bfloat16", "enforce_eager": False, "max_num_seqs": max(BATCHES)}
    llm = started(service_config(kind, drafter=drafter, engine=engine), ranges)
    say("started; draft lengths at the start:", ranges)
    core = llm.llm_engine.engine_core.engine_core
    for turn in ("first (warms up)", "second"):
        for length in range(DRAFT_TOKENS + 1) if kind != "none" else (0,):
            if kind != "none":
                core.set_draft_lengths([(1, max(BATCHES), length)])
            for batch in BATCHES:
                say(f"{kind}, {turn} pass, k = {length}, batch {batch}:", step_time(llm, batch))


def step_time(llm: LLM, batch: int) -> str:
    """Time of a step with `batch` responses of 150 tokens. The response with the most steps gives their number."""
    params = SamplingParams(temperature=1.0, max_tokens=150, ignore_eos=True, logprobs=0, flat_logprobs=True)
    prompts = [{"prompt_token_ids": [5, 6, 7 + i % 90]} for i in range(batch)]
    llm.reset_prefix_cache()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - began
    done = [completion for output in outputs for completion in output.outputs]
    records = [(len(c.token_ids), c.spec_decode_metrics) for c in done]
    steps = max(len(metrics.per_step_accepted) if metrics else tokens for tokens, metrics in records)
    tokens = sum(tokens for tokens, _ in records)
    return f"{1e3 * seconds / steps:.2f} ms per step, {tokens / seconds:.0f} tokens/s"
