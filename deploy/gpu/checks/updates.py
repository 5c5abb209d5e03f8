"""Weight updates of a running engine, made as the service makes them."""

import tempfile
import time
from pathlib import Path

import torch
from common import MODELS
from safetensors.torch import save_file
from torch import Tensor
from vllm import LLM

from drafters.files.checkpoint_folder import read_tensors
from drafters.kinds.mtp import is_mtp
from rollout_service.evaluation.noisy_copy import noisy_copy
from rollout_service.tensor_bytes import file_checksum

NOISE = 0.05
"""standard deviation of the noise, relative to that of the matrix that it is added to"""


def perturbed(policy: Path) -> Path:
    """A copy of a policy's folder with noise in every matrix, except those of the MTP head."""
    copy = Path(tempfile.mkdtemp()) / "policy"
    return noisy_copy(policy, copy, lambda name: not is_mtp(name), NOISE)


def drafter_tensors(kind: str) -> dict[str, Tensor]:
    """The unchanged tensors of the demo's drafter."""
    return read_tensors(MODELS / "policy", is_mtp) if kind == "mtp" else read_tensors(MODELS / kind)


def push(llm: LLM, tensors: dict[str, Tensor], dtype: torch.dtype, *, of_drafter: bool) -> str:
    """Loads tensors into the running policy or drafter. Returns the number of changed modules, and the seconds."""
    file = Path(tempfile.mkdtemp()) / "update.safetensors"
    save_file({name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}, file)
    llm.collective_rpc("read_checkpoint_tensors", args=(str(file),))
    began = time.monotonic()
    (report,) = llm.collective_rpc("load_checkpoint_tensors", args=(file_checksum(file), of_drafter))
    llm.reset_prefix_cache()  # it holds keys and values of the old weights
    return f"changed {report['changed']} of {report['modules']} modules in {time.monotonic() - began:.2f} s"
