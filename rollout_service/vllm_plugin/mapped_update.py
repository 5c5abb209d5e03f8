"""MappedUpdate: an update's file as a worker reads it: mapped, checked, and on a GPU pinned.

A GPU copies from pinned memory directly. From other memory the driver first copies into a buffer of its own, which is
slower. Pinning takes time too, but the engine generates meanwhile.

If an engine has several ranks, each computes the checksum of its part of the bytes. Together they cover the file once.
"""

import os
from pathlib import Path

import torch

from rollout_service.tensor_bytes import map_tensors


class MappedUpdate:
    pinned = 0
    """address of the pinned mapping; 0 if it is not pinned"""

    def __init__(self, file: Path, part: int, parts: int, device: torch.device):
        # A private mapping that is pinned would be copied, page by page.
        shared = device.type == "cuda" and os.access(file, os.W_OK)
        self.tensors, self.checksum = map_tensors(file, part, parts, shared=shared)
        if shared and self.tensors:
            from vllm.v1.kv_offload.cpu.host_register import host_register

            torch.cuda.set_device(device)  # of this thread; else it would open a context on the first GPU
            mapping = max((tensor.untyped_storage() for tensor in self.tensors.values()), key=len)
            if host_register(mapping.data_ptr(), len(mapping)):  # if not, vLLM's log says so, and copies are slower
                self.pinned = mapping.data_ptr()

    def __del__(self) -> None:
        """Unpin the mapping, which ends with its tensors."""
        if self.pinned:
            from vllm.v1.kv_offload.cpu.host_register import host_unregister

            torch.accelerator.synchronize()  # no copy is under way
            host_unregister(self.pinned)
