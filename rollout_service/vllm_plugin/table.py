"""The table of patches: every function of vLLM that is replaced or wrapped. `rollout-service patches` prints it."""

import logging
from collections.abc import Iterator
from pkgutil import resolve_name
from typing import Any

from rollout_service.vllm_plugin.cache_salt import CACHE_SALT
from rollout_service.vllm_plugin.core_process import CORE_PROCESS
from rollout_service.vllm_plugin.draft_length_lookup import DRAFT_LENGTHS
from rollout_service.vllm_plugin.draft_model_length import DRAFT_MODEL_LENGTH
from rollout_service.vllm_plugin.draft_steps import DRAFT_STEPS
from rollout_service.vllm_plugin.generate_parameters import GENERATE_PARAMETERS
from rollout_service.vllm_plugin.grammars import GRAMMARS
from rollout_service.vllm_plugin.graph_dispatch import GRAPH_DISPATCH
from rollout_service.vllm_plugin.idle_drafter import IDLE_DRAFTER
from rollout_service.vllm_plugin.logprobs_without_text import LOGPROBS_WITHOUT_TEXT
from rollout_service.vllm_plugin.own_policies import OWN_MTP_HEADS
from rollout_service.vllm_plugin.patches.experts import EXPERTS
from rollout_service.vllm_plugin.patches.kernels import KERNELS
from rollout_service.vllm_plugin.patches.ranks import RANKS
from rollout_service.vllm_plugin.patches.sampling import SAMPLING
from rollout_service.vllm_plugin.patches.weights import WEIGHTS
from rollout_service.vllm_plugin.required_prefix import REQUIRED_PREFIX
from rollout_service.vllm_plugin.routed_experts import RETURNED_ON_A_CPU, ROUTED_EXPERTS
from rollout_service.vllm_plugin.token_names import TOKEN_NAMES
from rollout_service.vllm_plugin.unsendable import UNSENDABLE
from rollout_service.vllm_plugin.watched_outputs import WATCHED_OUTPUTS

# Under vLLM's own logger, so that the line appears where vLLM's do.
logger = logging.getLogger("vllm.rollout_service")

DEFECTS = [*KERNELS, *RANKS, *SAMPLING, *WEIGHTS, *EXPERTS]
"""functions that are wrong, incomplete or very slow on a CPU, and are replaced there if they fail their self-test"""
DEFECTS_ON_A_GPU = [GRAPH_DISPATCH, DRAFT_MODEL_LENGTH]
"""functions of the runner that a GPU engine has, which are wrong, and replaced there if they fail their self-test"""
AT_LOADING = [DRAFT_STEPS, DRAFT_LENGTHS, LOGPROBS_WITHOUT_TEXT, OWN_MTP_HEADS, RETURNED_ON_A_CPU]
"""what vLLM lacks, put in place in each of its processes"""
ON_VLLMS_ROUTES = [UNSENDABLE, GRAMMARS, WATCHED_OUTPUTS, TOKEN_NAMES, GENERATE_PARAMETERS, REQUIRED_PREFIX]
"""what the routes lack that vLLM's own handlers answer"""
ELSEWHERE = [CORE_PROCESS, *IDLE_DRAFTER, *ROUTED_EXPERTS, CACHE_SALT, *ON_VLLMS_ROUTES]
"""what vLLM lacks, put in place where it is used"""
PATCHES = [*DEFECTS, *DEFECTS_ON_A_GPU, *AT_LOADING, *ELSEWHERE]
STOCK: dict[str, Any] = {}
"""vLLM's own functions of DEFECTS, by full name, as they were before any was replaced"""


def apply_patches() -> list[str]:
    """Put in place what each of vLLM's processes needs. Returns the names of the defects that this call replaced."""
    replaced = replace_defects()
    for patch in AT_LOADING:
        patch.ensure()
    return replaced


def replace_defects() -> list[str]:
    from vllm.platforms import current_platform

    here = DEFECTS if current_platform.is_cpu() else DEFECTS_ON_A_GPU
    # vLLM registers its kernels again when it makes its worker on a CPU, and would warn about each.
    logging.getLogger("vllm.triton_utils.dispatcher").setLevel(logging.ERROR)
    for patch in here:
        STOCK.setdefault(patch.name, resolve_name(patch.name))
    replaced = [patch for patch in here if patch.ensure()]
    for patch in replaced:
        logger.warning("Replaced %s, which fails its self-test on this platform: %s", patch.name, patch.reason)
    return [patch.name for patch in replaced]


def unneeded() -> list[str]:
    """The patches whose self-test passes without them on this platform. For a process in which none is applied."""
    return [patch.name for patch in PATCHES if patch.passes()]


def listing() -> Iterator[str]:
    """The table in lines of text, for a process in which none is applied."""
    passed = unneeded()
    for patch in PATCHES:
        test = "checks only that vLLM's functions are those that it was written for"
        if patch.is_right is not None:
            here = "PASSES WITHOUT IT here" if patch.name in passed else "fails without it here"
            test = f"{patch.is_right.__name__}, {here}"
        yield patch.name
        yield f"  file      {patch.file}"
        yield f"  why       {patch.reason}"
        yield f"  when      {patch.when}"
        yield f"  self-test {test}"
        if patch.shown_by:
            yield f"  shown by  {patch.shown_by}"
        yield f"  goes when {patch.unneeded}"
        yield ""
