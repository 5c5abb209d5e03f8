"""Common parts of the stages: settings from the environment, and the printing of results."""

import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
MODELS = Path(os.environ.get("CHECK_MODELS", ROOT / "deploy" / "demo" / "models"))
PADDED = Path("/tmp/padded")
DEVICE = os.environ.get("CHECK_DEVICE", "cuda")
SCALE = int(os.environ.get("CHECK_SCALE", "1"))
"""divisor of the numbers of responses and streams, for runs on a CPU"""
RESPONSES = int(os.environ.get("CHECK_RESPONSES", "1024")) // SCALE
"""responses of 48 tokens from which a sampling distribution is judged; after new weights a quarter of them"""

BEGAN = time.monotonic()


def say(*what: object) -> None:
    """Prints a line with the seconds since the stage began."""
    print(f"[{time.monotonic() - BEGAN:5.1f}s]", *what, flush=True)


def machine() -> str:
    """The version of torch, and the name of the GPU."""
    import torch  # imported here, so that its seconds count as part of the stage

    return f"torch {torch.__version__}, {torch.cuda.get_device_name() if DEVICE == 'cuda' else DEVICE}"


def reported(name: str, check: Callable[[], str]) -> None:
    """Prints the result of a check. An exception is a result too, and the next checks still run."""
    try:
        say(name, check())
    except Exception as error:
        say(name, "FAILED", type(error).__name__, str(error)[:400])
        traceback.print_exc(limit=-4)
