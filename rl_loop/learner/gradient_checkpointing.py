"""Gradient checkpointing in evaluation mode: a layer keeps only its input, and is computed again in the backward pass.

transformers checkpoints a layer only in training mode. That mode also turns on whatever else depends on it: dropout in
attention and between layers, layers that are skipped at random, noise on the inputs of experts. The policy would then
be trained on another distribution than the one that sampled. So layers are checkpointed here, in either mode.
"""

from functools import partial

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def recompute_layers(model: PreTrainedModel) -> None:
    """From now on, every layer of `model` that transformers can checkpoint is, wherever a gradient is taken.

    Raises ValueError when there is none.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"gradient_checkpointing: {type(model).__name__} has no layers that can be checkpointed")
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
