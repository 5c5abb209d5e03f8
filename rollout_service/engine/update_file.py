"""UpdateFile: the safetensors file of a weight update of several calls, which is filled tensor by tensor.

The file has a place for each tensor of the weight set from the start. So its size never grows, a tensor is copied
once, and an engine's process can fill the same file.

What a trainer may send beside the weight set's own tensors:

- Tensors of the other weight set (`mtp.*` with the policy, the policy's with a drafter) are left out.
- An output head that the checkpoint does not list is tied to the embedding. It is compared with that and left out.
- Everything else is refused by name.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from drafters.files.checkpoint_folder import TensorSpec, is_unused_buffer
from drafters.kinds.mtp import is_mtp
from rollout_service.protocol import Problem, WeightsOf
from rollout_service.tensor_bytes import DTYPES, create_file, map_writable
from rollout_service.transports import RefusedUpdate

HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
"""names of an output head, and the end of the embedding's, in the checkpoints that vLLM serves"""


@dataclass(frozen=True)
class TensorRules:
    """What an update of a weight set holds, and what is left out of it."""

    of: WeightsOf
    expected: dict[str, TensorSpec]
    """the tensors of the weight set, with the dtypes that an update has"""
    others: frozenset[str] = frozenset()
    """names that belong to the other weight set"""
    head_is_tied: bool = False
    """the config says so; an expected head that does not come is then the embedding"""

    @property
    def embedding(self) -> str | None:
        """The embedding of a policy, to which its head may be tied."""
        return next((name for name in self.expected if name.endswith(EMBEDDING)), None)

    def is_left_out(self, name: str) -> bool:
        if is_unused_buffer(name) or name in self.others or (self.of == "policy" and is_mtp(name)):
            return True
        return name == HEAD and self.embedding is not None  # a checkpoint without a head has a tied one

    def check(self, given: Mapping[str, TensorSpec]) -> None:
        """Raises RefusedUpdate with every tensor that has no place in the update. Dtypes may differ, because tensors
        are cast; only integers and floating-point numbers do not become one another."""
        found = []
        for name, (shape, dtype) in given.items():
            if name not in self.expected:
                if not self.is_left_out(name):
                    message = "unknown; the checkpoint in service has no tensor of this name"
                    found.append(Problem(field=name, message=message))
                continue
            wanted = self.expected[name]
            if shape != wanted.shape:
                found.append(Problem(field=name, message=f"shape {list(shape)}, expected {list(wanted.shape)}"))
            elif _is_floating(dtype) != _is_floating(wanted.dtype):
                found.append(Problem(field=name, message=f"dtype {dtype}, which does not become {wanted.dtype}"))
        if found:
            raise RefusedUpdate(f"the weight update was ended: {len(found)} of its tensors do not fit", found)


@dataclass
class UpdateFile:
    file: Path
    rules: TensorRules
    written: set[str] = field(default_factory=set)
    """tensors that have come"""
    left_out: set[str] = field(default_factory=set)

    @classmethod
    def create(cls, file: Path, rules: TensorRules) -> "UpdateFile":
        """Make it of a file that may be written over. Raises OSError when there is no room for it."""
        create_file(file, {name: (spec.shape, spec.dtype) for name, spec in rules.expected.items()})
        return cls(file, rules)

    def write(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy tensors to their places, cast to the update's dtypes. Raises RefusedUpdate for a tensor that does not
        fit; those before it are written."""
        places = map_writable(self.file)
        for name, tensor in tensors:
            self.rules.check({name: TensorSpec(tuple(tensor.shape), DTYPES[tensor.dtype])})
            if name in places:
                places[name].copy_(tensor)
                self.written.add(name)
            else:
                self._leave_out(name, tensor, places)

    def _leave_out(self, name: str, tensor: Tensor, places: Mapping[str, Tensor]) -> None:
        self.left_out.add(name)
        embedding = self.rules.embedding
        if name != HEAD or name in self.rules.others or embedding is None:
            return
        if embedding not in self.written:
            message = f"the head is tied to {embedding}, and is compared with it: send {embedding} first, or no head"
        elif not torch.equal(tensor.to(places[embedding].dtype).cpu(), places[embedding]):
            message = f"the head in service is tied to {embedding}, and this head differs from it: the model is another"
        else:
            return
        raise RefusedUpdate(
            "the weight update was ended: its output head does not fit", [Problem(field=name, message=message)]
        )

    def complete(self) -> None:
        """Take a tied head from the embedding. Raises RefusedUpdate with the tensors that have not come."""
        embedding = self.rules.embedding
        if self.rules.head_is_tied and embedding in self.written and HEAD in self.rules.expected.keys() - self.written:
            places = map_writable(self.file)
            places[HEAD].copy_(places[embedding])
            self.written.add(HEAD)
        missing = [name for name in self.rules.expected if name not in self.written]
        if missing:
            message = "did not come; an update must hold every tensor"
            raise RefusedUpdate(
                f"the weight update was ended: {len(missing)} of {len(self.rules.expected)} tensors did not come",
                [Problem(field=name, message=message) for name in missing],
            )


def _is_floating(dtype: str) -> bool:
    """`dtype` as safetensors names it."""
    return dtype.startswith(("F", "BF"))
