"""The model: Qwen3-Next's, with routed experts in a latent space. Source: arXiv 2601.18089.

    y = U sum_i p_i E_i(V x) + g(x) S(x)

V projects down to the latent space, and U up from it. All experts E_i share them. The router's p_i are the softmax of
scores of the full hidden state x, of the top K, which then sum to 1. S is the shared expert, and g its gate.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextDecoderLayer,
    Qwen3NextExperts,
    Qwen3NextForCausalLM,
    Qwen3NextModel,
    Qwen3NextPreTrainedModel,
    Qwen3NextRMSNorm,
    Qwen3NextRotaryEmbedding,
    Qwen3NextSparseMoeBlock,
    Qwen3NextTopKRouter,
)

from drafters.latent_moe.config import LatentMoEConfig


class LatentMoEBlock(Qwen3NextSparseMoeBlock):
    """The projections have Nemotron-H's names."""

    def __init__(self, config: LatentMoEConfig):
        super().__init__(config)
        in_latent_space = copy.copy(config)
        in_latent_space.hidden_size = config.moe_latent_size
        self.experts = Qwen3NextExperts(in_latent_space)
        self.fc1_latent_proj = nn.Linear(config.hidden_size, config.moe_latent_size, bias=False)
        self.fc2_latent_proj = nn.Linear(config.moe_latent_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x_ND = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights_NK, experts_NK = self.gate(x_ND)
        routed_ND = self.fc2_latent_proj(self.experts(self.fc1_latent_proj(x_ND), experts_NK, weights_NK))
        shared_ND = torch.sigmoid(self.shared_expert_gate(x_ND)) * self.shared_expert(x_ND)
        return (routed_ND + shared_ND).reshape(hidden_states.shape)


class LatentMoEDecoderLayer(Qwen3NextDecoderLayer):
    def __init__(self, config: LatentMoEConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if isinstance(self.mlp, Qwen3NextSparseMoeBlock):
            self.mlp = LatentMoEBlock(config)


class LatentMoEPreTrainedModel(Qwen3NextPreTrainedModel):
    _no_split_modules = ["LatentMoEDecoderLayer"]  # noqa: RUF012  (transformers' own form)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As Qwen3-Next's, which gives a router its first weights by way of its block. transformers passes over modules
        without weights of their own, such as the block, if the model is not its own; the router would stay zero."""
        super()._init_weights(module)
        if isinstance(module, Qwen3NextTopKRouter):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)


class LatentMoEModel(LatentMoEPreTrainedModel, Qwen3NextModel):
    config: LatentMoEConfig

    def __init__(self, config: LatentMoEConfig):
        Qwen3NextPreTrainedModel.__init__(self, config)  # Qwen3NextModel's own would make its layers first
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([LatentMoEDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = Qwen3NextRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3NextRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class LatentMoEForCausalLM(LatentMoEPreTrainedModel, Qwen3NextForCausalLM):
    config: LatentMoEConfig

    def __init__(self, config: LatentMoEConfig):
        Qwen3NextPreTrainedModel.__init__(self, config)
        self.model: Any = LatentMoEModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.num_experts, self.num_experts_per_tok = config.num_experts, config.num_experts_per_tok
        self.post_init()
