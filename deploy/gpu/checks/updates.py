"""Weight updates of a running engine, as the service pushes them."""

import shutil
import tempfile
import time
from pathlib import Path

import torch
from common import MODELS
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm import LLM

from drafters.files.checkpoint_folder import read_tensors
from drafters.kinds.mtp import is_mtp
from rollout_service.tensor_bytes import file_checksum

NOISE = 0.05
"""standard deviation of what is added to a matrix, relative to its own"""


def perturbed(policy: Path) -> Path:
    """A copy of a policy's folder in which every matrix but the MTP head's is another."""
    copy = Path(tempfile.mkdtemp()) / "policy"
    shutil.copytree(policy, copy)
    random = torch.Generator().manual_seed(3)

    def noisy(tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=random)
        return tensor + (NOISE * tensor.float().std() * noise).to(tensor.dtype)

    file = copy / "model.safetensors"
    tensors = {name: noisy(t) if t.dim() > 1 else t for name, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return copy


def drafter_tensors(kind: str) -> dict[str, Tensor]:
    """Those of the demo's drafter, as they are."""
    return read_tensors(MODELS / "policy", is_mtp) if kind == "mtp" else read_tensors(MODELS / kind)


def push(llm: LLM, tensors: dict[str, Tensor], dtype: torch.dtype, *, of_drafter: bool) -> str:
    """Load into the running policy or drafter; the modules that hold something else then, and the seconds it took."""
    file = Path(tempfile.mkdtemp()) / "update.safetensors"
    save_file({name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}, file)
    llm.collective_rpc("read_checkpoint_tensors", args=(str(file),))
    began = time.monotonic()
    (report,) = llm.collective_rpc("load_checkpoint_tensors", args=(file_checksum(file), of_drafter))
    llm.reset_prefix_cache()  # keys and values of the old weights
    return f"changed {report['changed']} of {report['modules']} modules in {time.monotonic() - began:.2f} s"
