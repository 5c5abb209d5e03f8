"""The environment of every test here: that of an engine's actor on a GPU, with Triton's interpreter for the kernels."""

import os
import sys
from pathlib import Path

from rollout_service.engine.hardware import engine_environment

ROOT = Path(__file__).resolve().parents[2]
os.environ.update(engine_environment("cuda", threads=1))
os.environ["TRITON_INTERPRET"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_CACHE_ROOT"] = str(ROOT / ".cuda" / "vllm-cache")
sys.path.insert(0, str(Path(__file__).parent))
