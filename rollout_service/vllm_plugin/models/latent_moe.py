"""LatentMoE in vLLM: Qwen3-Next's policy and MTP head, with the routed experts in a latent space.

The model is drafters/latent_moe/model.py. vLLM's experts take the two projections as transforms of what goes in and
comes out. The router reads the full hidden state, so its logits are computed before: a gate given to the experts would
read the latent one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import vllm.model_executor.models.qwen3_next as stock
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_ep_group, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod
from vllm.model_executor.models.qwen3_next_mtp import Qwen3NextMTP


class LatentMoEBlock(stock.Qwen3NextSparseMoeBlock):
    def __init__(self, vllm_config: VllmConfig, prefix: str = "", reduce_results: bool = True):
        nn.Module.__init__(self)  # the stock block's own makes and registers experts of full width
        config, quantisation = vllm_config.model_config.hf_text_config, vllm_config.quant_config
        parallel = vllm_config.parallel_config
        if parallel.use_sequence_parallel_moe:
            raise ValueError("engine.vllm: the experts of a latent_moe policy cannot be sequence-parallel")
        if get_tensor_model_parallel_world_size() > config.num_experts:
            raise ValueError(
                f"engine.tensor_parallel_size: {get_tensor_model_parallel_world_size()} is above the policy's "
                f"{config.num_experts} experts"
            )
        width, latent = config.hidden_size, config.moe_latent_size
        # What vLLM reads of every mixture, for balancing experts among ranks.
        self.is_fused_shared_expert_enabled = False
        self.enable_eplb = parallel.enable_eplb
        self.n_routed_experts = self.n_logical_experts = config.num_experts
        self.n_redundant_experts = parallel.eplb_config.num_redundant_experts
        self.n_physical_experts = self.n_logical_experts + self.n_redundant_experts
        self.n_local_physical_experts = self.n_physical_experts // get_ep_group().world_size

        def projection(name: str, inputs: int, outputs: int, quant_config: Any = quantisation) -> ReplicatedLinear:
            return ReplicatedLinear(inputs, outputs, bias=False, quant_config=quant_config, prefix=f"{prefix}.{name}")

        self.gate = GateLinear(width, config.num_experts, prefix=f"{prefix}.gate")
        self.shared_expert_gate = projection("shared_expert_gate", width, 1, None)
        self.shared_expert = stock.Qwen3NextMLP(
            hidden_size=width,
            intermediate_size=config.shared_expert_intermediate_size,
            hidden_act=config.hidden_act,
            quant_config=quantisation,
            reduce_results=False,
            expert_gate=self.shared_expert_gate,  # type: ignore[arg-type]
            prefix=f"{prefix}.shared_expert",
        )
        self.fc1_latent_proj = projection("fc1_latent_proj", width, latent)
        self.fc2_latent_proj = projection("fc2_latent_proj", latent, width)
        # A linear map without a bias commutes with the sum over ranks, so one sum after it is enough.
        commutes = isinstance(self.fc2_latent_proj.quant_method, UnquantizedLinearMethod)
        self.fc2_latent_proj.reduce_commutative = commutes  # type: ignore[assignment]
        self.experts = FusedMoEFactory(
            shared_experts=self.shared_expert,
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=latent,
            intermediate_size=config.moe_intermediate_size,
            renormalize=config.norm_topk_prob,
            quant_config=quantisation,
            prefix=f"{prefix}.experts",
            enable_eplb=self.enable_eplb,
            num_redundant_experts=self.n_redundant_experts,
            reduce_results=reduce_results,
            routed_input_transform=self.fc1_latent_proj,
            routed_output_transform=self.fc2_latent_proj,
        )

    def forward(self, hidden_states: Tensor, already_sequence_parallel: bool = False) -> Tensor:
        logits, _ = self.gate(hidden_states)
        return self.experts(hidden_states=hidden_states, router_logits=logits)


@contextmanager
def latent_blocks() -> Iterator[None]:
    """A context in which vLLM builds Qwen3-Next's layers with this block: it looks the block's name up as it builds."""
    own = stock.Qwen3NextSparseMoeBlock
    stock.Qwen3NextSparseMoeBlock = LatentMoEBlock  # type: ignore[misc]
    try:
        yield
    finally:
        stock.Qwen3NextSparseMoeBlock = own  # type: ignore[misc]


class LatentMoEForCausalLM(stock.Qwen3NextForCausalLM):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        with latent_blocks():
            super().__init__(vllm_config=vllm_config, prefix=prefix)


class LatentMoEMTP(Qwen3NextMTP):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        with latent_blocks():
            super().__init__(vllm_config=vllm_config, prefix=prefix)
