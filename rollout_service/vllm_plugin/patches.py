"""Functions of vLLM 0.32 that are wrong on the CPU, each with its reason, a self-test, and the function put in place.

A patch is applied only when its self-test fails, with one log line that says so: a vLLM that has been mended is left as
it is. The self-tests run the function as vLLM would (kernel overrides registered) on tensors of a few numbers.
"""

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from rollout_service.vllm_plugin.verification import (
    rejection_sample_is_right,
    rejection_sampler,
    replace_rejection_sample,
)

# Under vLLM's own logger, so that the line appears where vLLM's do.
logger = logging.getLogger("vllm.rollout_service")


@dataclass(frozen=True)
class Patch:
    """One function of vLLM: what is wrong with it, how that is noticed, what takes its place."""

    name: str
    reason: str
    is_right: Callable[[], bool]
    apply: Callable[[], None]


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


# --- triton_utils.dispatcher._rebind_kernels -----------------------------------------------------------------------


def kernels_are_rebound() -> bool:
    """A kernel's copy in another module is rebound, also beside an object that answers every attribute (llvmlite's)."""
    dispatcher: Any = import_module("vllm.triton_utils.dispatcher")

    class AnswersAll:
        def __getattribute__(self, name: str) -> Any:
            return print

    def kernel() -> None: ...

    module: Any = ModuleType("rollout_service_self_test")
    module.first, module.copy = AnswersAll(), kernel
    sys.modules[module.__name__] = module
    try:
        dispatcher._rebind_kernels([(kernel, "rebound")])
    finally:
        del sys.modules[module.__name__]
    return module.copy == "rebound"


def replace_rebind_kernels() -> None:
    dispatcher: Any = import_module("vllm.triton_utils.dispatcher")

    def _rebind_kernels(overrides: list[tuple[Any, Any]]) -> None:
        """Every module's attributes, and the attribute `kernel` of their values, that are an original kernel."""
        wrappers = {id(original): wrapper for original, wrapper in overrides}
        for module in list(sys.modules.values()):
            for name, value in list((getattr(module, "__dict__", None) or {}).items()):
                if id(value) in wrappers:
                    setattr(module, name, wrappers[id(value)])
                    continue
                own = getattr(value, "__dict__", None)
                if isinstance(own, Mapping) and id(own.get("kernel")) in wrappers:
                    value.kernel = wrappers[id(own["kernel"])]
                    if not isinstance(value, type):
                        value.__dict__.pop("_kernel_arg_names", None)

    dispatcher._rebind_kernels = _rebind_kernels


# --- v1.sample.rejection_sampler.expand_batch_to_tokens ------------------------------------------------------------


def expand_is_right() -> bool:
    """A request's temperature, top-k and top-p reach each of its draft positions, in float and in integer."""
    from vllm.platforms import current_platform

    current_platform.register_triton_kernel_overrides()
    cumulative = torch.tensor([2, 2, 5], dtype=torch.int32)
    temperature = rejection_sampler().expand_batch_to_tokens(
        torch.tensor([0.7, 0.3, 0.0]), cumulative, 5, replace_from=0, replace_to=1
    )
    top_k = rejection_sampler().expand_batch_to_tokens(torch.tensor([5, 6, 7], dtype=torch.int32), cumulative, 5)
    return bool(torch.equal(temperature, torch.tensor([0.7, 0.7, 1.0, 1.0, 1.0])) and top_k.tolist() == [5, 5, 7, 7, 7])


def expand_batch_to_tokens(
    x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> torch.Tensor:
    """[batch] -> [num_tokens]: each request's value, repeated for each of its tokens; `replace_from` is replaced."""
    ends = cu_num_tokens.to(torch.int64)
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    values = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return torch.repeat_interleave(values, counts, output_size=num_tokens)


def replace_expand() -> None:
    rejection_sampler().expand_batch_to_tokens = expand_batch_to_tokens


# --- v1.sample.rejection_sampler.apply_sampling_constraints ----------------------------------------------------------


def no_drafts_is_right() -> bool:
    """A step in which no request has a draft (n-grams that match nothing) goes through with top-k set."""
    sampling = SimpleNamespace(
        all_greedy=False, temperature=torch.ones(1), top_k=torch.tensor([2], dtype=torch.int32), top_p=None
    )
    nothing = torch.zeros(0, 4)
    drafts = torch.zeros(1, dtype=torch.int32)
    return rejection_sampler().apply_sampling_constraints(nothing, drafts, sampling).shape == (0, 4)


def replace_sampling_constraints() -> None:
    stock = rejection_sampler().apply_sampling_constraints

    def apply_sampling_constraints(logits: torch.Tensor, cu_num_draft_tokens: torch.Tensor, sampling: Any) -> Any:
        return stock(logits, cu_num_draft_tokens, sampling) if logits.shape[0] else logits

    rejection_sampler().apply_sampling_constraints = apply_sampling_constraints


# --- v1.worker.gpu_model_runner.GPUModelRunner._bookkeeping_sync -----------------------------------------------------


class _GotPast(Exception):
    """Raised by what the function reads next."""


def seeded_prefill_is_right() -> bool:
    """A seeded request whose step ends within its prompt, so that what was sampled is discarded, goes through."""
    runner: Any = import_module("vllm.v1.worker.gpu_model_runner")

    class Ids:
        def copy(self) -> None:
            raise _GotPast

    batch = SimpleNamespace(num_reqs=1, generators={0: torch.Generator()}, req_ids=Ids())
    mask = SimpleNamespace(np=torch.ones(1, dtype=torch.bool).numpy())
    itself = SimpleNamespace(
        use_async_scheduling=False, input_batch=batch, discard_request_mask=mask, _get_nans_in_logits=lambda logits: {}
    )
    try:
        runner.GPUModelRunner._bookkeeping_sync(itself, None, None, None, None, 0)
    except _GotPast:
        return True
    return False


def replace_bookkeeping() -> None:
    runner: Any = import_module("vllm.v1.worker.gpu_model_runner")

    stock = runner.GPUModelRunner._bookkeeping_sync

    def _bookkeeping_sync(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Of the generators it only winds back those of discarded samples; on a CPU they draw on instead.
        batch, generators = self.input_batch, self.input_batch.generators
        batch.generators = {}
        try:
            return stock(self, *args, **kwargs)
        finally:
            batch.generators = generators

    runner.GPUModelRunner._bookkeeping_sync = _bookkeeping_sync


# --- UnquantizedFusedMoEMethod._setup_kernel -----------------------------------------------------------------------


def experts_are_packed_again() -> bool:
    """The second call for a layer (a weight update) packs the experts for their kernel, as the first one does."""
    moe: Any = import_module("vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method")

    packed: list[object] = []
    experts = SimpleNamespace(process_weights_after_loading=packed.append)
    method: Any = moe.UnquantizedFusedMoEMethod.__new__(moe.UnquantizedFusedMoEMethod)
    torch.nn.Module.__init__(method)
    method.unquantized_backend = moe.UnquantizedMoeBackend.CPU
    method.moe_kernel = SimpleNamespace(fused_experts=experts)
    layer: Any = torch.nn.Module()
    layer.moe_config = None
    layer.w13_weight = torch.nn.Parameter(torch.zeros(1, 2, 2), requires_grad=False)
    layer.w2_weight = torch.nn.Parameter(torch.zeros(1, 2, 1), requires_grad=False)
    method._setup_kernel(layer, layer.w13_weight, layer.w2_weight)
    return packed == [layer]


def replace_setup_kernel() -> None:
    moe: Any = import_module("vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method")

    stock = moe.UnquantizedFusedMoEMethod._setup_kernel

    def _setup_kernel(self: Any, layer: Any, w13: torch.Tensor, w2: torch.Tensor) -> None:
        is_update = self.moe_kernel is not None
        stock(self, layer, w13, w2)
        if is_update:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    moe.UnquantizedFusedMoEMethod._setup_kernel = _setup_kernel


# --- finalize_layerwise_reload: a tied head --------------------------------------------------------------------------


def tied_head_is_packed_again() -> bool:
    """After a reload of the embedding, a head tied to it multiplies with the new values."""
    reload: Any = import_module("vllm.model_executor.model_loader.reload")

    model = _TiedModel()
    reload.record_metadata_for_reloading(model)
    model.pack()
    reload.initialize_layerwise_reload(model)
    new = torch.full((2, 2), 3.0)
    model.embed_tokens.weight.weight_loader(model.embed_tokens.weight, new)
    reload.finalize_layerwise_reload(model, None)
    return torch.equal(model.lm_head.packed, new)


class _PackedLayer(torch.nn.Module):
    """The outline of a vocabulary layer: a weight with its loader, and a packed copy that its kernel reads."""

    def __init__(self) -> None:
        super().__init__()
        weight: Any = torch.nn.Parameter(torch.zeros(2, 2), requires_grad=False)
        weight.weight_loader = lambda param, loaded: param.data.copy_(loaded)
        self.weight: Any = weight
        self.quant_method: Any = _packing_method()
        self.packed: Any = torch.empty(0)


def _packing_method() -> Any:
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    class Packing(QuantizeMethodBase):
        def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None: ...

        def apply(self, layer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            return layer.packed

        def process_weights_after_loading(self, layer: Any) -> None:
            layer.packed = layer.weight.detach().clone()

    return Packing()


class _TiedModel(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.lm_head = _PackedLayer(), _PackedLayer()
        self.lm_head.weight = self.embed_tokens.weight

    def pack(self) -> None:
        for layer in (self.embed_tokens, self.lm_head):
            layer.quant_method.process_weights_after_loading(layer)


def replace_finalize_reload() -> None:
    reload: Any = import_module("vllm.model_executor.model_loader.reload")
    layerwise: Any = import_module("vllm.model_executor.model_loader.reload.layerwise")

    stock = layerwise.finalize_layerwise_processing

    def finalize_layerwise_processing(model: torch.nn.Module, model_config: Any) -> None:
        stock(model, model_config)
        seen: dict[int, torch.nn.Module] = {}
        for layer in model.modules():
            weight = layer._parameters.get("weight")
            method: Any = getattr(layer, "quant_method", None)
            if weight is None or method is None or weight.numel() == 0:
                continue
            if weight.data_ptr() in seen:  # tied to a layer that was loaded: packed from the shared weight
                method.process_weights_after_loading(layer)
            seen.setdefault(weight.data_ptr(), layer)

    def finalize_layerwise_reload(*args: Any, **kwargs: Any) -> None:
        finalize_layerwise_processing(*args, **kwargs)

    layerwise.finalize_layerwise_processing = finalize_layerwise_processing
    layerwise.finalize_layerwise_reload = finalize_layerwise_reload
    reload.finalize_layerwise_reload = finalize_layerwise_reload


PATCHES = [
    Patch(
        "vllm.triton_utils.dispatcher._rebind_kernels",
        "it fails on modules that hold objects without a plain __dict__ (llvmlite's, once n-grams have loaded it), so "
        "the CPU kernels of a second engine in a process cannot be registered",
        kernels_are_rebound,
        replace_rebind_kernels,
    ),
    Patch(
        "vllm.v1.sample.rejection_sampler.expand_batch_to_tokens",
        "its CPU kernel writes to a copy unless the values are int64, so draft positions are divided by uninitialised "
        "memory and tokens are drawn from the wrong distribution at every temperature but 0",
        expand_is_right,
        replace_expand,
    ),
    Patch(
        "vllm.v1.sample.rejection_sampler.apply_sampling_constraints",
        "top-k takes the maximum of an empty tensor when no request of a step has a draft, which ends the engine",
        no_drafts_is_right,
        replace_sampling_constraints,
    ),
    Patch(
        "vllm.v1.sample.rejection_sampler.rejection_sample",
        "its CPU kernel passes on drafts that are no tokens (-1), where they are to be refused",
        rejection_sample_is_right,
        replace_rejection_sample,
    ),
    Patch(
        "vllm.v1.worker.gpu_model_runner.GPUModelRunner._bookkeeping_sync",
        "it winds back the generator of a seeded request whose prefill takes several steps (as after a weight update), "
        "which generators of a CPU cannot do, and the engine ends",
        seeded_prefill_is_right,
        replace_bookkeeping,
    ),
    Patch(
        "vllm...UnquantizedFusedMoEMethod._setup_kernel",
        "a weight update leaves the experts in plain layout where the CPU kernel reads the packed one",
        experts_are_packed_again,
        replace_setup_kernel,
    ),
    Patch(
        "vllm...reload.layerwise.finalize_layerwise_processing",
        "a weight update leaves an output head that is tied to the embedding with its old packed copy",
        tied_head_is_packed_again,
        replace_finalize_reload,
    ),
]
