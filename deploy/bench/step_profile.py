"""Profile of a decoding step, with and without a drafter: an engine in this process, with timed functions.

    python deploy/bench/step_profile.py [--streams '[1, 16, 32]'] [--drafters '["mtp"]'] [--draft_tokens 3]

The time of a part does not include the parts that it calls, so the parts add up to the step. A second table has the
same steps by operator, from torch's profiler. The time between operators is Python and dispatch.
"""

import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# vLLM reads these when it is imported.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_PLUGINS": "rollout_service", "VLLM_LOGGING_LEVEL": "ERROR"}
os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

from bench_config import BenchConfig
from padding import ensure_padded
from pydantic import Field
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from drafters.registry import DrafterConfig
from drafters.settings import read_command_line
from rollout_service.engine.arguments import bare_llm, sampling_params
from rollout_service.engine.hardware import machine_cores
from rollout_service.evaluation.prompts import read_prompts
from rollout_service.protocol import GroupRequest, Sampling

PARTS = (
    "policy's forward", "policy's logits", "drafter's forwards", "drafter's sampling", "drafting, the rest",
    "verification", "sampling and log-probabilities", "inputs", "bookkeeping", "scheduling", "results", "outputs",
)  # fmt: skip

OPERATORS = {
    "_C::onednn_mm": "linear layers (oneDNN)",
    "_C::cpu_fused_moe": "experts (vLLM's kernel)",
    "_C::cpu_attention_with_kv_cache": "attention",
}
OTHERS, BETWEEN = "other operators", "between operators"


class ProfileConfig(BenchConfig):
    """Profile a decoding step. Fields are those of the benchmark; the drafter is the first of `drafters`."""

    streams: list[int] = Field(default=[1, 16, 32], min_length=1)
    draft_tokens: int = Field(default=3, ge=0, le=16)
    """draft length; 0 measures an engine with an idle drafter"""
    steps: int = Field(default=32, ge=4)
    """steps to measure; about a quarter as many warm up"""


class Account:
    """Seconds by part. No time counts in two parts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.within: list[float] = []
        """for each running part: the seconds of the parts that it has called"""

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        self.within.append(0.0)
        try:
            yield
        finally:
            whole = time.perf_counter() - began
            self.seconds[name] += whole - self.within.pop()
            if self.within:
                self.within[-1] += whole

    def time(self, owner: Any, function: str, name: str) -> None:
        """Makes `owner.function` a part."""
        stock: Callable[..., Any] = getattr(owner, function)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return stock(*args, **kwargs)

        setattr(owner, function, timed)


def main() -> None:
    config = read_command_line(ProfileConfig, "step_profile", sys.argv[1:])
    ensure_padded(config.source, config.padded, config.shape)
    longest = max(1, config.draft_tokens)
    drafting = config.drafter(
        config.drafters[0], draft_tokens=longest, schedule=[(1, config.engine.max_num_seqs, longest)]
    )
    arms = DrafterConfig(), drafting
    without, with_it = (profile(config, drafter) for drafter in arms)
    for streams in config.streams:
        for before, after in zip(without[streams], with_it[streams], strict=True):
            Console().print(table(config, streams, before, after))


def profile(config: ProfileConfig, drafter: DrafterConfig) -> dict[int, tuple[dict[str, float], dict[str, float]]]:
    """Seconds of a step by part and by operator, for each number of streams."""
    import torch
    from vllm.distributed import cleanup_dist_env_and_memory

    torch.set_num_threads(config.engine.cores or machine_cores())
    llm = bare_llm(config.served(drafter))
    if drafter.kind != "none":
        llm.collective_rpc("let_drafter_idle")
        ranges = [(1, config.engine.max_num_seqs, config.draft_tokens)]
        llm.llm_engine.engine_core.engine_core.set_draft_lengths(ranges)
    account = Account()
    instrument(llm.llm_engine, account)
    prompts = read_prompts(config.policy, config.prompts)
    found = {streams: steps(llm.llm_engine, account, config, prompts, streams) for streams in config.streams}
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    return found


def instrument(llm: Any, account: Account) -> None:
    from vllm.v1.sample import rejection_sampler

    core = llm.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    account.time(llm, "step", "outputs")
    account.time(core.scheduler, "schedule", "scheduling")
    account.time(core.scheduler, "update_from_output", "results")
    account.time(runner, "execute_model", "inputs")
    account.time(runner, "_model_forward", "policy's forward")
    account.time(runner.model, "compute_logits", "policy's logits")
    account.time(runner, "_sample", "sampling and log-probabilities")
    account.time(rejection_sampler, "rejection_sample", "verification")
    account.time(runner, "sample_tokens", "bookkeeping")
    if runner.speculative_config is not None and hasattr(runner.drafter, "model"):
        account.time(runner, "propose_draft_token_ids", "drafting, the rest")
        account.time(runner.drafter.model, "forward", "drafter's forwards")
        account.time(runner.drafter, "_sample_draft_tokens", "drafter's sampling")


def steps(
    llm: Any, account: Account, config: ProfileConfig, prompts: list[list[int]], streams: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds by part and by operator. Every step decodes all streams: no step has a prompt, and no stream ends."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as traced

    tokens = config.engine.max_model_len // 2
    params = sampling_params(
        GroupRequest(prompt_token_ids=[0], sampling=Sampling(max_tokens=tokens, temperature=1.0, ignore_eos=True))
    )
    names = [f"{streams}-{i}" for i in range(streams)]
    for i, name in enumerate(names):
        llm.add_request(name, {"prompt_token_ids": prompts[i % len(prompts)]}, params)
    for _ in range(2 + config.steps // 4):
        llm.step()
    account.seconds.clear()
    for _ in range(config.steps):
        llm.step()
    parts = {name: account.seconds[name] / config.steps for name in PARTS}
    few = config.steps // 4
    with traced(activities=[ProfilerActivity.CPU]) as trace:
        for _ in range(few):
            llm.step()
    operators = dict.fromkeys([*OPERATORS.values(), OTHERS], 0.0)
    for event in trace.key_averages():
        operators[OPERATORS.get(event.key, OTHERS)] += event.self_cpu_time_total / 1e6 / few
    operators[BETWEEN] = sum(parts.values()) - sum(operators.values())  # relative to a step that is not traced
    llm.abort_request(names)
    while llm.has_unfinished_requests():
        llm.step()
    return parts, operators


def table(config: ProfileConfig, streams: int, without: dict[str, float], with_it: dict[str, float]) -> Table:
    result = Table(title=f"{streams} streams, ms per step", box=SIMPLE)
    for column in ("part", "no drafter", f"{config.drafters[0]}, k = {config.draft_tokens}", "difference"):
        result.add_column(column, justify="left" if column == "part" else "right")
    rows = [(name, without[name], with_it[name]) for name in without]
    rows.append(("the step", sum(without.values()), sum(with_it.values())))
    for name, before, after in rows:
        result.add_row(name, f"{1e3 * before:.1f}", f"{1e3 * after:.1f}", f"{1e3 * (after - before):+.1f}")
    return result


if __name__ == "__main__":
    main()
