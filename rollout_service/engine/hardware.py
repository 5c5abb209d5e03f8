"""Hardware and environment of an engine's process: cores, preloaded libraries, and the variables that vLLM reads."""

import os
import shlex
import sys
from pathlib import Path

import psutil

PRELOADED = "libiomp5.so", "libtbbmalloc.so.2", "libtbbmalloc_proxy.so.2"
"""OpenMP, and in the place of glibc's malloc that of oneTBB: steps without drafts are 4 to 7 % shorter."""


def preloads() -> dict[str, str]:
    """The environment variables that load what the environment ships of PRELOADED. Without libiomp5 a step of
    speculation, which is many small parallel regions, loses speed on a CPU.

    LD_PRELOAD ends a path at a space, and knows no quotes. Names without a folder are looked for in LD_LIBRARY_PATH,
    where a folder's name may hold spaces.
    """
    folder = Path(sys.prefix) / "lib"
    found = [name for name in PRELOADED if (folder / name).exists()]
    if " " not in str(folder):
        return {"LD_PRELOAD": ":".join(str(folder / name) for name in found)}
    searched = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {"LD_PRELOAD": ":".join(found), "LD_LIBRARY_PATH": ":".join(searched)}


def interpreter() -> dict[str, str]:
    """What Ray's `runtime_env` must be told of the interpreter: nothing, unless its path means something else to a
    shell. Ray puts the path into a shell's command line as it is."""
    quoted = shlex.quote(sys.executable)
    return {} if quoted == sys.executable else {"py_executable": quoted}


def machine_cores() -> int:
    return len(os.sched_getaffinity(0)) or psutil.cpu_count() or 1


def engine_environment(device: str, threads: int) -> dict[str, str]:
    """Environment variables of an engine's actor and of the vLLM process that it starts."""
    common = {
        "VLLM_PLUGINS": "rollout_service",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if device == "cuda":
        # Where flashinfer is installed vLLM's V2 runner samples with it what has top-k or top-p and returns no
        # log-probabilities, as requests to vLLM's own routes do. No check of ours has judged its cuts: all requests are
        # sampled by the one sampler that was judged.
        return common | {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
    return common | {
        # The worker runs inside the engine's core process: one process less to start and to talk to.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # vLLM's own binding leaves cores unused on small virtual machines.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
        **preloads(),
        # Where glibc's malloc is used, it keeps what is freed instead of returning it: a weight update takes as much
        # again, and zeroing new pages was 60 of its 210 ms for 265 MiB. The second is the largest that it allows.
        "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
        "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
        # oneTBB's malloc keeps what is larger than this, in bytes. By default it returns what prompts took, and they
        # take 1.3 times as long then; where everything is kept (64 KiB), decoding steps gain nothing.
        "TBB_MALLOC_SET_HUGE_SIZE_THRESHOLD": str(4 << 20),
        # OpenMP's threads wait actively after a parallel region, and on few cores what else would run waits for them:
        # at 200 ms, their default, vLLM's output thread (which the core then waits for, 2 ms of a step of 64 streams)
        # and probably the actor's imports (a start takes 2 s more). At 0 they sleep between operators as well, and
        # steps take 1.4 times as long.
        "KMP_BLOCKTIME": "1",
        "KMP_USE_SHM": "0",  # OpenMP would leave a shared-memory file behind when its process is killed
    }


def resolve_device(device: str) -> str:
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
