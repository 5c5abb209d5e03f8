"""The Eagle3 head (arXiv 2503.01840): one Llama block over the next token and three fused hidden states of the policy.

Equal to vLLM's `llama_eagle3.py` with its defaults (`norm_before_residual`, `norm_output` and `fc_norm` off): at the
first draft step the hidden state is `fc` of the policy's, at later ones the head's own before `norm`. The embedding is
the policy's; the output head is its own, over a reduced vocabulary chosen from data.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

from drafters.learners.learner import Learner, PolicyOutputs
from drafters.training.unroll import unroll


def frequent_tokens(texts: Iterable[list[int]], size: int, vocab_size: int) -> list[int]:
    """The `size` most frequent token ids, ascending; ties go to the lower id. Tokens outside are never drafted."""
    counts = Counter(token for text in texts for token in text)
    return sorted(sorted(range(vocab_size), key=lambda token: -counts[token])[:size])


def eagle3_config(policy: PreTrainedModel, layers: tuple[int, ...], vocabulary_size: int) -> LlamaConfig:
    """The head's `config.json`: the policy's width and heads, and the keys that vLLM reads."""
    config: Any = policy.config
    read_by_vllm: dict[str, Any] = {
        "draft_vocab_size": vocabulary_size,
        # Always explicit: on a shallow policy vLLM's default ids collide.
        "eagle_aux_hidden_state_layer_ids": list(layers),
        "num_aux_hidden_states": len(layers),
    }
    return LlamaConfig(
        architectures=["LlamaForCausalLMEagle3"],
        num_hidden_layers=1,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=2 * config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        **read_by_vllm,
    )


class Eagle3Layer(nn.Module):
    """A Llama block whose attention reads embedding and hidden state side by side."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = LlamaRMSNorm(width, eps=eps)
        self.hidden_norm = LlamaRMSNorm(width, eps=eps)
        self.self_attn = LlamaAttention(config, layer_idx=0)
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self.self_attn, name, nn.Linear(2 * width, getattr(self.self_attn, name).out_features, bias=False))
        self.post_attention_layernorm = LlamaRMSNorm(width, eps=eps)
        self.mlp = LlamaMLP(config)

    def forward(self, embedded_BTD: Tensor, hidden_BTD: Tensor, **attention) -> Tensor:
        both = torch.cat([self.input_layernorm(embedded_BTD), self.hidden_norm(hidden_BTD)], dim=-1)
        hidden_BTD = hidden_BTD + self.self_attn(both, **attention)[0]
        return hidden_BTD + self.mlp(self.post_attention_layernorm(hidden_BTD))


class Eagle3Head(Learner):
    """`config` as `eagle3_config` makes it; `vocabulary` are the ids that can be drafted, ascending."""

    d2t: Tensor

    def __init__(self, config: Any, vocabulary: list[int]):
        super().__init__()
        config._attn_implementation = "sdpa"
        self.config = config
        self.policy_layers = tuple(config.eagle_aux_hidden_state_layer_ids)
        width = config.hidden_size
        self.fc = nn.Linear(len(self.policy_layers) * width, width, bias=False)
        self.midlayer = Eagle3Layer(config)
        self.norm = LlamaRMSNorm(width, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(width, len(vocabulary), bias=False)
        self.rotary = LlamaRotaryEmbedding(config)
        # The checkpoint holds offsets: policy id = draft id + d2t[draft id].
        self.register_buffer("d2t", torch.tensor(vocabulary) - torch.arange(len(vocabulary)))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=config.initializer_range)

    @classmethod
    def from_policy(cls, policy: PreTrainedModel, layers: tuple[int, ...], vocabulary: list[int]) -> "Eagle3Head":
        """A new head whose output head starts as the policy's rows of `vocabulary`."""
        head = cls(eagle3_config(policy, layers, len(vocabulary)), vocabulary)
        policy_head: Any = policy.get_output_embeddings()
        head.lm_head.weight.data.copy_(policy_head.weight[vocabulary])
        return head

    @property
    def vocabulary(self) -> Tensor:
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def draft_logprobs(self, tokens_BT: Tensor, policy: PolicyOutputs, steps: int) -> list[Tensor]:
        def step(
            tokens_BT: Tensor, hidden_BTD: Tensor, positions_T: Tensor, mask_TK: Tensor, keys: DynamicCache
        ) -> tuple[Tensor, Tensor]:
            hidden_BTD = self.midlayer(
                nn.functional.embedding(tokens_BT, policy.embedding_VD),
                hidden_BTD,
                position_embeddings=self.rotary(hidden_BTD, positions_T[None]),
                attention_mask=mask_TK[None, None],
                past_key_values=keys,
            )
            drafted = self.lm_head(self.norm(hidden_BTD)).float().log_softmax(-1)
            logprobs_BTV = drafted.new_full((*tokens_BT.shape, self.config.vocab_size), -torch.inf)
            return logprobs_BTV.index_copy(-1, self.vocabulary, drafted), hidden_BTD

        return unroll(step, tokens_BT, self.fc(torch.cat(policy.layers_BTD, dim=-1)), steps)

    def checkpoint(self) -> dict[str, Tensor]:
        return dict(self.state_dict())

    def load_checkpoint(self, tensors: dict[str, Tensor]) -> None:
        self.load_state_dict(tensors)
