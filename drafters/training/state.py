"""A learner and its AdamW as named tensors, so that training goes on bit for bit. Safetensors, no pickle."""

import torch
from torch import Tensor

from drafters.learners.learner import Learner


def training_state(learner: Learner, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """A copy, on the CPU."""
    tensors = {f"learner.{name}": t for name, t in learner.state_dict().items()}
    for name, parameter in learner.named_parameters():
        for key, value in optimiser.state.get(parameter, {}).items():
            tensors[f"optimiser.{name}.{key}"] = value
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}


def restore_training_state(tensors: dict[str, Tensor], learner: Learner, optimiser: torch.optim.Optimizer) -> None:
    """The inverse. Raises RuntimeError when the tensors are another learner's."""
    own = {name.removeprefix("learner."): t for name, t in tensors.items() if name.startswith("learner.")}
    learner.load_state_dict(own)
    for name, parameter in learner.named_parameters():
        keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"optimiser.{name}.{key}" in tensors]
        values = {key: tensors[f"optimiser.{name}.{key}"] for key in keys}
        if values:  # AdamW keeps its step count on the CPU
            optimiser.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in values.items()
            }
