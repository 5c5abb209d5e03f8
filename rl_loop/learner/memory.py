"""Memory that a learner needs, from the policy's shapes and the configuration, before any weight is loaded.

What depends on the number of parameters is exact. Activations are an estimate from the shapes of a layer's weights: a
test compares it with what torch keeps. An online drafter is left out: its head is small beside the policy.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

import drafters.latent_moe  # noqa: F401  (which transformers then knows)
from drafters.chunked_scoring import logits_bytes
from drafters.expert_routing import find_routers
from rl_loop.config import TrainConfig
from rl_loop.learner.local_learner import compute_dtype

FLOAT32 = 4
NORMS = 4
"""hidden states in float32 that a layer keeps: the inputs and the outputs of its two norms"""
LAST = 3
"""hidden states in float32 that are kept after the last layer"""
ROUTED = 2
"""numbers in float32 for each expert of each layer that the load-balancing loss keeps: logits and probabilities"""


class MemoryNeeds(NamedTuple):
    """Bytes on the learner's device at the peak of a step."""

    weights: int
    """of the policy, and of the reference policy if there is one"""
    gradients: int
    """of all tensors, and of the largest one twice: what is added to a gradient is computed first"""
    optimiser: int
    """AdamW's two moments"""
    versions_to_push: int
    """asynchronous training: the version on its way and the next one, in 2 bytes a parameter"""
    activations: int
    """what the forward pass of the largest micro-batch keeps, and copies of the weights in bfloat16"""
    logits: int

    @property
    def total(self) -> int:
        return sum(self)


def memory_needs(config: TrainConfig, folder: Path, device: torch.device, longest: int) -> MemoryNeeds:
    """For the policy in `folder`. `longest`: the most tokens that a rollout may have. Raises OSError and ValueError
    when transformers cannot make the policy."""
    policy = policy_without_weights(folder)
    sizes = [parameter.numel() for parameter in policy.parameters()]
    parameters, weight = sum(sizes), getattr(torch, config.weights_dtype).itemsize
    product = compute_dtype(config, device).itemsize
    of_step = config.prompts_per_step * config.completions * longest
    tokens = min(of_step, max(longest, config.max_tokens_per_microbatch))
    copies = parameters * product if product < weight else 0
    of_token = activation_bytes(policy, product, weight, config.gradient_checkpointing)
    if config.router_coefficient > 0.0:
        experts: list[Any] = [router.weight for router in find_routers(policy)]
        of_token += ROUTED * FLOAT32 * sum(map(len, experts))
    head: Any = policy.get_output_embeddings()
    return MemoryNeeds(
        weights=parameters * weight * (2 if config.kl_coefficient > 0.0 else 1),
        gradients=(parameters + max(sizes)) * weight,
        optimiser=2 * parameters * weight,
        versions_to_push=2 * 2 * parameters if config.mode == "async" else 0,
        activations=tokens * of_token + copies,
        logits=logits_bytes(tokens, len(head.weight)),
    )


def policy_without_weights(folder: Path) -> PreTrainedModel:
    """The modules and shapes of the policy in `folder`. Raises OSError and ValueError when transformers cannot make
    it."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def activation_bytes(policy: PreTrainedModel, product: int, weight: int, checkpointing: bool) -> int:
    """Bytes for each token that the forward pass keeps for the backward pass, and what the backward pass works on.

    `product` and `weight` are the bytes of a number in matrix products and in weights. With gradient checkpointing, a
    layer keeps only its input, and the backward pass works on one layer.
    """
    layers = [module for module in policy.modules() if isinstance(module, GradientCheckpointingLayer)]
    width: int = policy.config.get_text_config().hidden_size
    experts: int = getattr(policy.config.get_text_config(), "num_experts_per_tok", 1)
    # Where products are in bfloat16 and weights in float32, about half of the numbers are kept in both.
    of_layers = [sum(_channels(layer, experts)) * (product + weight) // 2 + NORMS * width * FLOAT32 for layer in layers]
    kept = len(layers) * width * weight if checkpointing else sum(of_layers)
    return kept + LAST * width * FLOAT32 + max(of_layers, default=0)


def _channels(layer: nn.Module, experts: int) -> Iterator[int]:
    """For one token: the channels that each product with the layer's weights reads and writes."""
    for module in layer.modules():
        if isinstance(module, nn.Conv1d):
            yield module.in_channels + module.out_channels
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 2:
                yield sum(parameter.shape)
            elif parameter.ndim == 3:  # all experts, of which a token passes some
                yield experts * sum(parameter.shape[1:])


class DeviceMemory(NamedTuple):
    """Bytes. On a GPU, other processes hold what is not free."""

    free: int
    total: int


def device_memory(device: torch.device) -> DeviceMemory:
    if device.type == "cuda":
        return DeviceMemory(*torch.cuda.mem_get_info(device))
    memory = psutil.virtual_memory()
    return DeviceMemory(memory.available, memory.total)
