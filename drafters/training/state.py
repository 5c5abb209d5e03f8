"""Training state: a learner and its AdamW as named tensors, to resume bit for bit. It uses safetensors, not pickle."""

import torch
from torch import Tensor, nn

from drafters.learners.learner import DrafterLearner

LEARNER, OPTIMISER = "learner.", "optimiser."


def training_state(learner: DrafterLearner, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """A copy of the state on the CPU."""
    tensors = {LEARNER + name: t for name, t in learner.state_dict().items()}
    tensors |= {OPTIMISER + name: t for name, t in adamw_state(learner, optimiser).items()}
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}


def restore_training_state(
    tensors: dict[str, Tensor], learner: DrafterLearner, optimiser: torch.optim.Optimizer
) -> None:
    """Loads what `training_state` returned. Raises RuntimeError if the tensors are another learner's."""
    learner.load_state_dict(_without(LEARNER, tensors))
    restore_adamw_state(_without(OPTIMISER, tensors), learner, optimiser)


def adamw_state(module: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's own tensors for the parameters that it has updated, under the names `<parameter>.<key>`."""
    return {
        f"{name}.{key}": value.contiguous()
        for name, parameter in module.named_parameters()
        for key, value in optimiser.state.get(parameter, {}).items()
    }


def restore_adamw_state(tensors: dict[str, Tensor], module: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Loads what `adamw_state` returned. AdamW's state from before is dropped."""
    optimiser.state.clear()
    for name, parameter in module.named_parameters():
        keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{key}" in tensors]
        values = {key: tensors[f"{name}.{key}"] for key in keys}
        if values:  # AdamW keeps its step count on the CPU
            optimiser.state[parameter] = {
                key: value if key == "step" else value.to(parameter) for key, value in values.items()
            }


def _without(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
