"""Patches for weight updates: functions that would still use old values."""

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch

from rollout_service.vllm_plugin.patch import defect

EXPERTS = "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method"
RELOAD = "vllm.model_executor.model_loader.reload"

# --- UnquantizedFusedMoEMethod._setup_kernel ---


def experts_are_packed_again() -> bool:
    """The second call for a layer (a weight update) packs the experts for their kernel, as the first one does."""
    moe: Any = import_module(EXPERTS)

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
    moe: Any = import_module(EXPERTS)

    stock = moe.UnquantizedFusedMoEMethod._setup_kernel

    def _setup_kernel(self: Any, layer: Any, w13: torch.Tensor, w2: torch.Tensor) -> None:
        is_update = self.moe_kernel is not None
        stock(self, layer, w13, w2)
        if is_update:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    moe.UnquantizedFusedMoEMethod._setup_kernel = _setup_kernel


# --- finalize_layerwise_reload: a tied head ---


def tied_head_is_packed_again() -> bool:
    """After a reload of the embedding, a head tied to it multiplies with the new values."""
    reload: Any = import_module(RELOAD)

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
    reload: Any = import_module(RELOAD)
    layerwise: Any = import_module(f"{RELOAD}.layerwise")

    stock = layerwise.finalize_layerwise_processing

    def finalize_layerwise_processing(model: torch.nn.Module, model_config: Any) -> None:
        stock(model, model_config)
        seen: dict[int, torch.nn.Module] = {}
        for layer in model.modules():
            weight = layer._parameters.get("weight")
            method: Any = getattr(layer, "quant_method", None)
            if weight is None or method is None or weight.numel() == 0:
                continue
            if weight.data_ptr() in seen:  # tied to a layer that was loaded: pack the shared weight
                method.process_weights_after_loading(layer)
            seen.setdefault(weight.data_ptr(), layer)

    def finalize_layerwise_reload(*args: Any, **kwargs: Any) -> None:
        finalize_layerwise_processing(*args, **kwargs)

    layerwise.finalize_layerwise_processing = finalize_layerwise_processing
    layerwise.finalize_layerwise_reload = finalize_layerwise_reload
    reload.finalize_layerwise_reload = finalize_layerwise_reload


WEIGHTS = [
    defect(
        f"{EXPERTS}.UnquantizedFusedMoEMethod._setup_kernel",
        "a weight update leaves the experts in plain layout, but the CPU kernel reads the packed layout",
        experts_are_packed_again,
        replace_setup_kernel,
    ),
    defect(
        f"{RELOAD}.layerwise.finalize_layerwise_processing",
        "a weight update leaves an output head that is tied to the embedding with its old packed copy",
        tied_head_is_packed_again,
        replace_finalize_reload,
    ),
]
