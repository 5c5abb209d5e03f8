"""DrafterLearner: a drafter as a torch module, whose distributions equal those that the engine drafts from.

Shapes, here and in `drafters/training`: B sequences, T tokens (padded on the right), D hidden size, V vocabulary, N
rows that count. Rows i and draft steps j count from 0. Row i of draft step j is the draft that has read tokens 0..i+1
of the policy and j drafted tokens after them. It proposes token i + 2 + j. In training, teacher forcing replaces the
drafted tokens by the policy's.

Drafter and policy return hidden states and an output head, not logits. With a large vocabulary, logits [B, T, V] would
take most of the memory, and only the rows that count are needed.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from drafters.registry import HeadShape


@dataclass(frozen=True)
class OutputHead:
    """Maps hidden states to log-probabilities over `vocab_size` tokens. Tokens outside `ids_V` (None: all) get -inf."""

    weight_VD: Tensor
    vocab_size: int
    ids_V: Tensor | None = None

    def logprobs(self, hidden_ND: Tensor, temperature: float = 1.0) -> Tensor:
        """log softmax(logits / temperature), float32 [..., V]."""
        logits_NV = nn.functional.linear(hidden_ND.to(self.weight_VD.dtype), self.weight_VD).float()
        logprobs_NV = (logits_NV / temperature).log_softmax(-1)
        if self.ids_V is None:
            return logprobs_NV
        everywhere_NV = logprobs_NV.new_full((*hidden_ND.shape[:-1], self.vocab_size), -torch.inf)
        return everywhere_NV.index_copy(-1, self.ids_V, logprobs_NV)


@dataclass(frozen=True)
class PolicyOutputs:
    """All that a drafter may read of the policy. No tensor here carries a gradient."""

    output_BTD: Tensor
    """the hidden state after the final norm, which the output head reads"""
    layers_BTD: tuple[Tensor, ...]
    """the hidden states entering the layers that the learner asked for"""
    embedding_VD: Tensor
    head_VD: Tensor

    @property
    def head(self) -> OutputHead:
        return OutputHead(self.head_VD, len(self.head_VD))

    def at(self, indices_BT: Tensor) -> "PolicyOutputs":
        """The outputs at these tokens only. An index counts the tokens of all sequences, in order."""
        return replace(
            self,
            output_BTD=self.output_BTD.flatten(0, 1)[indices_BT],
            layers_BTD=tuple(hidden_BTD.flatten(0, 1)[indices_BT] for hidden_BTD in self.layers_BTD),
        )

    def embedded(self, tokens_BT: Tensor) -> Tensor:
        return nn.functional.embedding(tokens_BT, self.embedding_VD).to(self.output_BTD.dtype)


def final_norm(policy: PreTrainedModel) -> nn.Module:
    """The norm between the last layer and the output head. Models of Mamba's family call it `norm_f`."""
    decoder: Any = policy.get_decoder()
    return decoder.norm if hasattr(decoder, "norm") else decoder.norm_f


@torch.no_grad()
def read_policy(policy: PreTrainedModel, tokens_BT: Tensor, layers: tuple[int, ...] = ()) -> PolicyOutputs:
    """One forward pass of the policy.

    The ids in `layers` are those of vLLM's `aux_hidden_state_layers`: id i is the input of layer i, and the number of
    layers is the id of the last layer's output, before the final norm.
    """
    decoder: Any = policy.get_decoder()
    with reading_policy(policy, layers) as read:
        decoder(input_ids=tokens_BT, use_cache=False)
    return read.outputs()


class PolicyReading:
    """Hidden states of the policy's latest forward pass, filled in by the hooks of `reading_policy`."""

    def __init__(self, policy: PreTrainedModel, layers: tuple[int, ...]):
        self.policy, self.layers = policy, layers
        self.entering: dict[int, Tensor] = {}
        self.output_BTD: Tensor | None = None

    def outputs(self) -> PolicyOutputs:
        embedding: Any = self.policy.get_input_embeddings()
        head: Any = self.policy.get_output_embeddings()
        assert self.output_BTD is not None, "the policy has had no forward pass since the hooks were set"
        return PolicyOutputs(
            output_BTD=self.output_BTD.float(),
            layers_BTD=tuple(self.entering[i].float() for i in self.layers),
            embedding_VD=embedding.weight.detach(),
            head_VD=head.weight.detach(),
        )


@contextmanager
def reading_policy(policy: PreTrainedModel, layers: tuple[int, ...]) -> Iterator[PolicyReading]:
    """Sets hooks on the policy that keep detached hidden states: the inputs of `layers` and the final norm's output.

    The hooks change nothing in a forward pass: no value, no graph, no random number.
    """
    decoder: Any = policy.get_decoder()
    read, norm = PolicyReading(policy, layers), final_norm(policy)

    def enters(i: int) -> Any:
        return lambda _, args: read.entering.__setitem__(i, args[0].detach())

    modules = {i: decoder.layers[i] if i < len(decoder.layers) else norm for i in layers}
    hooks = [module.register_forward_pre_hook(enters(i)) for i, module in modules.items()]
    hooks.append(norm.register_forward_hook(lambda _, __, out: setattr(read, "output_BTD", out.detach())))
    try:
        yield read
    finally:
        for hook in hooks:
            hook.remove()


class DrafterLearner(nn.Module, ABC):
    """A drafter as a module to train. Its checkpoint uses the tensor names that the engine loads."""

    kind: ClassVar[str]
    in_policy_folder: ClassVar[bool] = False
    """whether its tensors are part of the policy's checkpoint; if so, `write` writes the whole policy with them"""
    policy_layers: tuple[int, ...] = ()
    """ids of the policy's hidden states that the drafter reads, ascending"""

    @classmethod
    @abstractmethod
    def new(cls, policy: PreTrainedModel, shape: HeadShape, texts: Iterable[list[int]]) -> Self:
        """An untrained drafter for this policy, which will learn from `texts` (token ids).

        Raises ValueError for an architecture or a shape that the kind cannot have.
        """

    @classmethod
    @abstractmethod
    def from_folder(cls, folder: Path, policy: PreTrainedModel) -> Self:
        """The drafter in `folder`. That is a policy's folder if the drafter is part of the policy's checkpoint.

        Raises ValueError that says what the folder lacks, or why the drafter does not fit the policy.
        """

    @abstractmethod
    def draft_states(self, tokens_BT: Tensor, policy: PolicyOutputs, steps: int) -> list[Tensor]:
        """The hidden states [B, T, D] that the output head reads, one tensor for each draft step.

        A row that would propose a token past the end holds a value without meaning.
        """

    @abstractmethod
    def output_head(self, policy: PolicyOutputs) -> OutputHead:
        """The head that turns `draft_states` into the drafter's distributions."""

    @abstractmethod
    def checkpoint(self) -> dict[str, Tensor]:
        """The drafter's own tensors, and none of the policy's, under their checkpoint names."""

    @abstractmethod
    def load_checkpoint(self, tensors: dict[str, Tensor]) -> None:
        """Loads what `checkpoint` returns. Raises KeyError or RuntimeError if a tensor is missing or misshapen."""

    @abstractmethod
    def write(self, folder: Path, policy_folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Writes a checkpoint folder that vLLM loads unchanged."""

    def draft_logprobs(
        self, tokens_BT: Tensor, policy: PolicyOutputs, steps: int, temperature: float = 1.0
    ) -> list[Tensor]:
        """The drafter's log-probabilities [B, T, V] at each draft step; only for a small vocabulary."""
        head = self.output_head(policy)
        return [head.logprobs(states_BTD, temperature) for states_BTD in self.draft_states(tokens_BT, policy, steps)]

    def save(self, file: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Writes the checkpoint as safetensors, with floating-point tensors in `dtype`."""
        save_file(cast(self.checkpoint(), dtype), file, metadata={"format": "pt"})

    def load(self, file: Path) -> None:
        """Reads what `save` wrote, in this module's dtype."""
        self.load_checkpoint(load_file(file))


def cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Detached, contiguous copies on the CPU, with floating-point tensors in `dtype`."""
    return {
        name: (t.detach().to(dtype) if t.is_floating_point() else t.detach()).cpu().contiguous()
        for name, t in tensors.items()
    }


def shifted(values_BT: Tensor, by: int) -> Tensor:
    """`result[:, i] = values[:, i + by]`, with zero (or False) past the end."""
    result = torch.zeros_like(values_BT)
    result[:, : values_BT.shape[1] - by] = values_BT[:, by:]
    return result
