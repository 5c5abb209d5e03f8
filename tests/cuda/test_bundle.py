"""The bundle of deploy/gpu: everything that its checks import is in it, or on the machine (machine.txt)."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / ".cuda" / "site"
CHECKS = ROOT / "deploy" / "gpu" / "checks"

IMPORTS = """
import importlib, sys
sys.path.insert(0, sys.argv[1])
from without_ray import stand_in
stand_in()
for name in sys.argv[2:]:
    importlib.import_module(name)
"""
LATER = (
    "vllm.v1.engine.core",
    "vllm.v1.worker.gpu_worker",
    "vllm.v1.worker.gpu.model_runner",
    "vllm.v1.attention.backends.flash_attn",
    "vllm.v1.attention.backends.triton_attn",
    "vllm.entrypoints.openai.api_server",
    "rollout_service.engine.engine",
    "rollout_service.engine.openai_app",
    "rollout_service.engine.http_server",
    "transformers.models.qwen3_next.modeling_qwen3_next",
)
"""what an engine and the checks import when they run"""


def test_vllm_is_that_of_the_bundle():
    import vllm

    assert Path(vllm.__file__).is_relative_to(SITE)


def test_what_the_checks_import_is_in_the_bundle_or_on_the_machine():
    # As for the stages with a fleet, a stand-in takes the place of Ray, which the machine lacks.
    checks = sorted(file.stem for file in CHECKS.glob("*.py"))
    assert checks
    command = [sys.executable, "-c", IMPORTS, str(CHECKS), *checks, *LATER]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-2000:]


def test_the_stripped_libraries_load_and_have_their_operators():
    import torch
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    assert torch.ops._C.rms_norm
    assert torch.ops._moe_C.topk_softmax
    import vllm.vllm_flash_attn._vllm_fa3_C  # noqa: F401

    assert torch.ops._vllm_fa3_C.fwd
