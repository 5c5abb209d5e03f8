"""Patches for Nemotron-H and its relatives: ungated experts, and policies with and without recurrent layers."""

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import linear

from rollout_service.vllm_plugin.patch import defect

MOE = "vllm.model_executor.layers.fused_moe"
WITHOUT_STATE = {"attention", "full_attention", "moe", "mlp"}
"""layer types of transformers whose layers keep nothing beside the keys and values of attention"""

# --- FusedMoEConfig.__post_init__ ---


def ungated_config() -> Any:
    """vLLM's configuration of two experts, one chosen, in which the square of a ReLU takes the place of a gate."""
    moe: Any = import_module(f"{MOE}.config")
    return moe.FusedMoEConfig(
        num_experts=2,
        experts_per_token=1,
        hidden_dim=32,
        intermediate_size=32,
        num_local_experts=2,
        num_logical_experts=2,
        activation=import_module(f"{MOE}.activation").MoEActivation.RELU2_NO_MUL,
        device="cpu",
        routing_method=moe.RoutingMethodType.DeepSeekV3,
        moe_parallel_config=moe.FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=torch.float32,
    )


def ungated_config_is_made() -> bool:
    return not ungated_config().is_act_and_mul


def replace_config_init() -> None:
    config: Any = import_module(f"{MOE}.config").FusedMoEConfig
    stock = config.__post_init__

    def __post_init__(self: Any) -> None:
        try:
            stock(self)
        except NotImplementedError as error:  # raised by its last statement
            if "is_act_and_mul" not in str(error):
                raise

    config.__post_init__ = __post_init__


# --- oracle.unquantized.backend_to_kernel_cls ---


def ungated_experts_are_right() -> bool:
    """The experts that vLLM chooses on a CPU compute down(relu(up(x))^2), times the router's weight."""
    moe, oracle = import_module(f"{MOE}.config"), import_module(f"{MOE}.oracle.unquantized")
    config = ungated_config()
    _, experts_class = oracle.select_unquantized_moe_backend(config)
    experts = experts_class(config, moe.FusedMoEQuantConfig.make())
    draws = torch.Generator().manual_seed(0)
    up_EID, down_EDI = (torch.randn(2, 32, 32, generator=draws) for _ in range(2))
    layer = torch.nn.Module()
    for name, weight in (("w13_weight", up_EID), ("w2_weight", down_EDI)):
        layer.register_parameter(name, torch.nn.Parameter(weight, requires_grad=False))
    experts.process_weights_after_loading(layer)
    hidden_ND, weights_N1 = torch.randn(3, 32, generator=draws), torch.tensor([[0.5], [2.0], [1.0]])
    chosen_N1 = torch.tensor([[1], [0], [1]], dtype=torch.int32)
    found_ND, empty = torch.empty_like(hidden_ND), torch.empty(0)
    experts.apply(  # by the names that vLLM's kernel gives
        output=found_ND, hidden_states=hidden_ND, w1=layer.w13_weight, w2=layer.w2_weight, topk_weights=weights_N1,
        topk_ids=chosen_N1, activation=config.activation, global_num_experts=2, expert_map=None, a1q_scale=None,
        a2_scale=None, workspace13=empty, workspace2=empty, expert_tokens_meta=None, apply_router_weight_on_input=False,
    )  # fmt: skip
    up_NID, down_NDI = up_EID[chosen_N1[:, 0]], down_EDI[chosen_N1[:, 0]]
    squared_NI = torch.einsum("nid,nd->ni", up_NID, hidden_ND).relu().square()
    expected_ND = weights_N1 * torch.einsum("ndi,ni->nd", down_NDI, squared_NI)
    return torch.allclose(found_ND, expected_ND, rtol=1e-4, atol=1e-4 * expected_ND.abs().max().item())


def ungated_experts() -> type:
    """Experts without a gate, computed by torch. vLLM's class has the alignment and the packing of its kernel, of which
    this one needs nothing."""
    cpu: Any = import_module(f"{MOE}.experts.cpu_moe")
    relu2 = import_module(f"{MOE}.activation").MoEActivation.RELU2_NO_MUL

    class UngatedExperts(cpu.CPUUnquantizedExperts):
        @staticmethod
        def _supports_no_act_and_mul() -> bool:
            return True

        @staticmethod
        def _supports_activation(activation: Any) -> bool:
            return activation == relu2

        @staticmethod
        def _supports_parallel_config(parallel: Any) -> bool:
            return not parallel.use_ep  # all experts are here, so that a router's id is an index

        @classmethod
        def _supports_grouped_gemm(cls, moe_config: Any) -> tuple[bool, str | None]:
            return True, None

        def process_weights_after_loading(self, layer: torch.nn.Module) -> None: ...

        def apply(
            self,
            output: torch.Tensor,
            hidden_states: torch.Tensor,
            w1: torch.Tensor,
            w2: torch.Tensor,
            topk_weights: torch.Tensor,
            topk_ids: torch.Tensor,
            **_: Any,
        ) -> None:
            """output (N, D) of hidden_states (N, D), w1 (E, I, D), w2 (E, D, I), topk_weights and topk_ids (N, K)"""
            sum_ND = torch.zeros(hidden_states.shape, dtype=torch.float32)
            for expert in topk_ids.unique().tolist():
                rows, choices = (topk_ids == expert).nonzero(as_tuple=True)
                squared = linear(hidden_states[rows], w1[expert]).relu().square()
                sum_ND.index_add_(0, rows, linear(squared, w2[expert]).float() * topk_weights[rows, choices, None])
            output.copy_(sum_ND)

    return UngatedExperts


def replace_kernel_classes() -> None:
    oracle: Any = import_module(f"{MOE}.oracle.unquantized")
    stock, ungated = oracle.backend_to_kernel_cls, ungated_experts()

    def backend_to_kernel_cls(backend: Any) -> list[type]:
        """vLLM's own classes first: they take all that they support."""
        of_cpu = backend == oracle.UnquantizedMoeBackend.CPU
        return [*stock(backend), ungated] if of_cpu else stock(backend)

    oracle.backend_to_kernel_cls = backend_to_kernel_cls


# --- ModelConfig.is_hybrid ---


def experts_make_no_hybrid() -> bool:
    """A policy of attention, experts and feed-forward layers is no hybrid. With a recurrent layer it is one."""
    model: Any = import_module("vllm.config.model").ModelConfig

    def is_hybrid(*layer_types: str) -> bool:
        itself = SimpleNamespace(hf_config=SimpleNamespace(layer_types=list(layer_types)))
        itself._model_info = SimpleNamespace(is_hybrid=True)
        return model.is_hybrid.fget(itself)

    return is_hybrid("linear_attention", "moe") and not is_hybrid("full_attention", "moe", "full_attention", "mlp")


def replace_is_hybrid() -> None:
    model: Any = import_module("vllm.config.model").ModelConfig
    stock = model.is_hybrid.fget

    def is_hybrid(self: Any) -> bool:
        layer_types = getattr(self.hf_config, "layer_types", None)
        return stock(self) and (layer_types is None or not set(layer_types) <= WITHOUT_STATE)

    model.is_hybrid = property(is_hybrid)


# --- ModelConfig.is_prefix_caching_supported ---


def hybrids_have_no_prefix_caching() -> bool:
    """By default a policy with recurrent layers has no prefix caching. One without has."""
    model: Any = import_module("vllm.config.model").ModelConfig

    def is_supported(attn_type: str) -> bool:
        itself = SimpleNamespace(attn_type=attn_type, pooler_config=None)
        return model.is_prefix_caching_supported.fget(itself)

    return is_supported("decoder") and not is_supported("hybrid")


def replace_is_prefix_caching_supported() -> None:
    model: Any = import_module("vllm.config.model").ModelConfig
    stock = model.is_prefix_caching_supported.fget
    model.is_prefix_caching_supported = property(lambda self: self.attn_type != "hybrid" and stock(self))


EXPERTS = [
    defect(
        f"{MOE}.config.FusedMoEConfig.__post_init__",
        "it refuses experts without a gate on a CPU, such as Nemotron-H's",
        ungated_config_is_made,
        replace_config_init,
    ),
    defect(
        f"{MOE}.oracle.unquantized.backend_to_kernel_cls",
        "it has no experts without a gate for a CPU; a class that computes them by torch is added to its list",
        ungated_experts_are_right,
        replace_kernel_classes,
    ),
    defect(
        "vllm.config.model.ModelConfig.is_hybrid",
        "it takes layers of experts for recurrent ones. With prefix caching, the engine of a policy that has no "
        "recurrent layer then looks for their states, and ends at the first request",
        experts_make_no_hybrid,
        replace_is_hybrid,
    ),
    defect(
        "vllm.config.model.ModelConfig.is_prefix_caching_supported",
        "it turns prefix caching on for policies with recurrent layers. A CPU has no kernel that copies the states of "
        "such layers, so the engine ends once a text fills a block",
        hybrids_have_no_prefix_caching,
        replace_is_prefix_caching_supported,
    ),
]
