"""Gradient checkpointing in evaluation mode: a layer keeps only its input, and is computed again in the backward pass.

transformers checkpoints a layer only in training mode. That mode also turns on dropout in attention and between layers,
random skipping of layers, and noise on the inputs of experts. Training would then use another distribution than the one
that sampled. This module checkpoints layers in either mode.
"""

from functools import partial

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def recompute_layers(model: PreTrainedModel) -> None:
    """From now on, checkpoint every layer of `model` that transformers can checkpoint.

    Raises ValueError when there is no such layer.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"gradient_checkpointing: {type(model).__name__} has no layers that can be checkpointed; set it to false"
        )
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
