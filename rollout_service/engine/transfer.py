"""TransferReceiver: receives a trainer's weights over NCCL or CUDA IPC into an update's file, by vLLM's own transfer.

The service is one receiver, whatever its fleet: the first engine's actor is rank 1 of the trainer's group of two.
vLLM's transfer engine loads what it receives into a model. Here that model is a stand-in, which copies the tensors into
the file. So the engines load nothing before the update is whole, and they go on generating while it arrives.

It runs in threads of the actor. A trainer that dies during a transfer leaves a thread that waits for ever: NCCL has no
timeout. The fleet gives up waiting, and the trainer's next start opens another connection.
"""

import asyncio
import functools
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from rollout_service.engine.update_file import TensorRules, UpdateFile

T = TypeVar("T")
DEVICE = "cuda:0"
"""Ray shows an actor only the GPUs that are its own"""
NCCL_ONLY = "master_address", "nccl_unique_id_b64"
"""fields of an `init_info` that are NCCL's alone; CUDA IPC's has no address"""


class StandIn:
    """What vLLM's transfer engine takes for the model."""

    update: UpdateFile | None = None

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        assert self.update is not None
        weights = list(weights)
        self.update.write(weights)
        return {name for name, _ in weights}


def vllm_engine(vllm_config: Any, backend: str, model: StandIn) -> Any:
    """vLLM's transfer engine of this name over `model`."""
    import torch
    from vllm.config.weight_transfer import WeightTransferConfig
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    config, device, stand_in = WeightTransferConfig(backend=backend), torch.device(DEVICE), model
    return WeightTransferEngineFactory.create_engine(config, vllm_config, device, stand_in)  # type: ignore[arg-type]


class TransferReceiver:
    def __init__(self, vllm_config: Any, init_info: dict[str, Any], make: Callable[..., Any] = vllm_engine):
        self.backend = "nccl" if any(init_info.get(name) is not None for name in NCCL_ONLY) else "ipc"
        self.model = StandIn()
        self.engine = make(vllm_config, self.backend, self.model)
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="weight-transfer", initializer=_use_device)
        self.at_work: Future[Any] | None = None

    async def _in_its_thread(self, work: Callable[[], T]) -> T:
        self.at_work = self.pool.submit(work)
        return await asyncio.wrap_future(self.at_work)

    async def open(self, init_info: dict[str, Any]) -> None:
        """Returns when the trainer has joined. Raises ValueError when `init_info` is not vLLM's."""
        parsed = self.engine.parse_init_info(init_info)
        await self._in_its_thread(functools.partial(self.engine.init_transfer_engine, parsed))

    async def receive(self, update_info: dict[str, Any], file: str, rules: TensorRules, written: set[str]) -> set[str]:
        """Receive what `update_info` (vLLM's) describes into the file. `written`: names of the tensors that are in it.
        Returns these names with those that came. Raises ValueError for a wrong `update_info` or tensor."""
        update = self.model.update = UpdateFile(Path(file), rules, set(written))
        await self._in_its_thread(functools.partial(self.engine.update_weights, update_info))
        return update.written

    async def close(self) -> None:
        """Leave the trainer's group. A transfer that still waits for its trainer is left to itself."""
        if self.at_work is None or self.at_work.done():
            await self._in_its_thread(self.engine.shutdown)
        self.pool.shutdown(wait=False)


def _use_device() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(DEVICE)
