"""What the trainer sees of a drafter: a torch module whose distributions equal those the engine drafts from.

Shapes, here and in `drafters/training`: B sequences, T tokens (padded on the right), D hidden, V vocabulary, N counted
rows. Row i of draft step j (both from 0) is the draft that knows tokens 0..i+1 of the policy's own and j drafted ones
after them; it proposes token i + 2 + j. Teacher forcing puts the policy's tokens in the place of the drafted ones.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class PolicyOutputs:
    """All that a drafter may read of the policy, none of it carrying a gradient."""

    logprobs_BTV: Tensor
    """log-probabilities of the next token at every position, temperature 1"""
    output_BTD: Tensor
    """the hidden state after the final norm, which the output head reads"""
    layers_BTD: tuple[Tensor, ...]
    """the hidden states entering the layers that the learner asked for"""
    embedding_VD: Tensor
    head_VD: Tensor


@torch.no_grad()
def read_policy(policy: PreTrainedModel, tokens_BT: Tensor, layers: tuple[int, ...] = ()) -> PolicyOutputs:
    """One forward of the policy. Layer id i < the number of layers is what enters layer i; id = the number of layers
    is what the last layer gives, before the final norm (vLLM's `aux_hidden_state_layers`)."""
    decoder: Any = policy.get_decoder()
    with _inputs_of([decoder.layers[i] if i < len(decoder.layers) else decoder.norm for i in layers]) as entering:
        output_BTD = decoder(input_ids=tokens_BT, use_cache=False).last_hidden_state
    embedding: Any = policy.get_input_embeddings()
    head: Any = policy.get_output_embeddings()
    return PolicyOutputs(
        logprobs_BTV=nn.functional.linear(output_BTD, head.weight).float().log_softmax(-1),
        output_BTD=output_BTD,
        layers_BTD=tuple(entering),
        embedding_VD=embedding.weight.detach(),
        head_VD=head.weight.detach(),
    )


@contextmanager
def _inputs_of(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """The first argument of each module's next call, in the order of calls."""
    inputs: list[Tensor] = []
    hooks = [module.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for module in modules]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


class Learner(nn.Module, ABC):
    """A drafter as a module to train. Its tensors travel under the names that the engine loads."""

    policy_layers: tuple[int, ...] = ()
    """ids of the policy's hidden states that the drafter reads, ascending"""

    @abstractmethod
    def draft_logprobs(self, tokens_BT: Tensor, policy: PolicyOutputs, steps: int) -> list[Tensor]:
        """The drafter's log-probabilities [B, T, V] of each draft step; -inf for tokens it cannot draft.

        Rows that would propose a token past the end hold values without meaning.
        """

    @abstractmethod
    def checkpoint(self) -> dict[str, Tensor]:
        """The drafter's own tensors (none of the policy's) under their checkpoint names."""

    @abstractmethod
    def load_checkpoint(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `checkpoint`. Raises KeyError or RuntimeError when a tensor is missing or misshapen."""

    def save(self, file: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write the checkpoint as safetensors, floating-point tensors in `dtype`."""
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in self.checkpoint().items()}
        save_file({name: t.contiguous() for name, t in tensors.items()}, file, metadata={"format": "pt"})

    def load(self, file: Path) -> None:
        """Read what `save` wrote, into this module's own dtype."""
        self.load_checkpoint(load_file(file))


def shifted(values_BT: Tensor, by: int) -> Tensor:
    """`result[:, i] = values[:, i + by]`, and zero (or False) past the end."""
    result = torch.zeros_like(values_BT)
    result[:, : values_BT.shape[1] - by] = values_BT[:, by:]
    return result
