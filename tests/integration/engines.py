"""Real engines: in-process ones for tests of vLLM's insides, and launched services for tests over HTTP."""

import gc
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
"""processes that run tests side by side; they divide the cores, since OpenMP's threads spin while they wait"""
CORES = max(1, (os.cpu_count() or 1) // WORKERS)

# Before vllm is imported anywhere in this process.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_PLUGINS": "rollout_service",
    "OMP_NUM_THREADS": str(CORES), "NUMBA_NUM_THREADS": str(CORES), "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "deploy" / "demo" / "models"
START_WITHIN = 240


class Kept:
    """The engine that the next test finds running, if it asks for the same. One at most: two of them in a process
    disturb each other."""

    key, llm, stack = "", None, ExitStack()

    @classmethod
    def end(cls) -> None:
        cls.stack.close()
        cls.key, cls.llm = "", None


def kept_llm(folder, drafter, draft_lengths, **more):
    """`in_process_llm` that goes on running. For tests that leave it as they found it, but for its draft lengths."""
    key = f"{folder} {drafter} {draft_lengths} {more}"
    if Kept.key != key:
        Kept.end()
        Kept.llm = Kept.stack.enter_context(in_process_llm(folder, drafter, draft_lengths, **more))
        Kept.key = key
    Kept.llm.reset_prefix_cache()
    Kept.llm.llm_engine.engine_core.engine_core.set_draft_lengths(draft_lengths)
    return Kept.llm


@contextmanager
def in_process_llm(folder, drafter, draft_lengths=None, **more) -> Iterator:
    """vLLM with everything in this process, configured as by the engine's actor. `draft_lengths`: ranges of a schedule
    that can be changed."""
    Kept.end()
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    from drafters.registry import make_drafter

    speculative = make_drafter(drafter).speculative_config()
    if draft_lengths is not None:
        speculative["num_speculative_tokens_per_batch_size"] = draft_lengths
    llm = LLM(
        str(folder), dtype="float32", enforce_eager=True, distributed_executor_backend="uni",
        kv_cache_memory_bytes=64 << 20, generation_config="vllm",
        disable_log_stats=False, speculative_config=speculative,
        worker_extension_cls="rollout_service.vllm_plugin.worker.WorkerExtension",
        **{"max_model_len": 256, "max_num_seqs": 32, "logprobs_mode": "processed_logprobs", **more},
    )  # fmt: skip
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


@contextmanager
def launching(*arguments: str) -> Iterator[subprocess.Popen]:
    """`rollout-service launch` as a process, at a free port, with a pipe as its stderr."""
    environment = {k: v for k, v in os.environ.items() if k not in ("VLLM_PLUGINS", "OMP_NUM_THREADS")}
    share = ("--engine.cores", str(CORES)) if WORKERS > 1 else ()
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / "rollout-service"), "launch", "--port", "0", *share, *arguments],
        stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()


@contextmanager
def launched(*arguments: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """Yields the URL of a launched service once it serves. Afterwards SIGTERM stops it, and it must leave nothing."""
    with launching(*arguments) as process:
        lines = []
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"https?://[\d.]+:\d+", line):
                yield found.group(), process
                break
        else:
            pytest.fail("the service did not start:\n" + "".join(lines))
        if process.poll() is None:
            assert stopped(process, signal.SIGTERM) == (0, [])


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def stopped(process: subprocess.Popen, signum: int) -> tuple[int, list[psutil.Process]]:
    """Stop a service. Returns its exit code, and what is left of it."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signum)
    code = process.wait(40)
    return code, psutil.wait_procs(children, timeout=15)[1]


def wait_until(condition, within: float, what: str) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, f"not within {within} s: {what}"
        time.sleep(0.25)
