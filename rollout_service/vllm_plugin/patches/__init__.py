"""Functions of vLLM 0.32 that are wrong or very slow on the CPU, each with its reason, self-test, and successor.

A patch is applied only when its self-test fails, with one log line that says so: a vLLM that has been mended is left as
it is. The self-tests run the function as vLLM would (kernel overrides registered) on tensors of a few numbers.
"""

import logging
from collections.abc import Callable
from typing import Any

from rollout_service.vllm_plugin.patches.kernels import KERNELS
from rollout_service.vllm_plugin.patches.patch import Patch as Patch
from rollout_service.vllm_plugin.patches.ranks import RANKS
from rollout_service.vllm_plugin.patches.sampling import SAMPLING
from rollout_service.vllm_plugin.patches.weights import WEIGHTS
from rollout_service.vllm_plugin.verification import rejection_sampler

# Under vLLM's own logger, so that the line appears where vLLM's do.
logger = logging.getLogger("vllm.rollout_service")

PATCHES = [*KERNELS, *RANKS, *SAMPLING, *WEIGHTS]
APPLIED: list[str] = []
"""names of the functions replaced in this process"""
STOCK: dict[str, Any] = {}
"""vLLM's own functions of the rejection sampler, by name, as they were before any was replaced"""


def apply_patches() -> list[str]:
    """Test each patched function and replace the wrong ones. Returns the names of those replaced by this call."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return []
    # vLLM registers its kernels once more when it makes its worker, and would warn of each.
    logging.getLogger("vllm.triton_utils.dispatcher").setLevel(logging.ERROR)
    for function in ("expand_batch_to_tokens", "apply_sampling_constraints", "rejection_sample"):
        STOCK.setdefault(function, getattr(rejection_sampler(), function))
    replaced = []
    for patch in PATCHES:
        if patch.name in APPLIED:  # vLLM loads its plugins more than once in a process
            continue
        if not _passes(patch.is_right):
            patch.apply()
            if not patch.is_right():
                raise RuntimeError(
                    f"{patch.name} fails its self-test even when replaced: refusing to serve wrong samples"
                )
            logger.warning("Replaced %s, which fails its self-test on this platform: %s", patch.name, patch.reason)
            replaced.append(patch.name)
    APPLIED.extend(replaced)
    return replaced


def _passes(test: Callable[[], bool]) -> bool:
    try:
        return test()
    except Exception:
        return False
