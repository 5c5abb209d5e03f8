"""Transfer: a trainer's weights over NCCL or CUDA IPC, which the first engine alone receives (engine/transfer.py)."""

import asyncio
from typing import Any

from ray.exceptions import RayTaskError

from rollout_service.engine.update_file import UpdateFile
from rollout_service.fleet.controls import Controls
from rollout_service.fleet.member import FleetError, in_words
from rollout_service.fleet.routing import ENGINE_LOST
from rollout_service.transports import RefusedUpdate
from rollout_service.transports.transport import refused

RECEIVE_WITHIN = 1800.0
"""seconds that a transfer may take; a trainer that died in it never ends it"""


class Transfer:
    def __init__(self, controls: Controls, device: str):
        self.controls, self.device = controls, device

    def check(self) -> None:
        """Raises RefusedUpdate on a CPU."""
        if self.device != "cuda":
            raise refused(
                "init_info",
                "NCCL and CUDA IPC need a GPU, and these engines run on a CPU. Push over POST /v1/weights/policy, or "
                'send /update_weights {"weight_dir": FOLDER}, or {"update_info": {"file": NAME}} for a safetensors '
                "file in the shared-memory folder that GET /v1/weights names",
            )

    async def open(self, init_info: dict[str, Any]) -> str:
        """Join the trainer's group. Returns the transport's name. Raises RefusedUpdate when `init_info` is wrong."""
        return await self._ask("open_transfer", init_info)

    async def close(self) -> None:
        if self.device == "cuda":
            await self._ask("close_transfer")

    async def receive(self, update: UpdateFile, info: dict[str, Any]) -> None:
        """Receive what `info` (vLLM's) announces into the update. Raises RefusedUpdate for what does not fit, and
        FleetError when the transfer does not end."""
        self.check()
        names = info.get("names")
        for name in names if isinstance(names, list) else ():
            if name not in update.rules.expected:
                if not update.rules.is_left_out(str(name)):
                    raise refused(str(name), "unknown; the checkpoint in service has no tensor of this name")
                update.left_out.add(str(name))
        update.written |= await self._ask("receive", info, str(update.file), update.rules, update.written)

    async def _ask(self, what: str, *arguments: Any) -> Any:
        """What the first engine answers."""
        try:
            async with asyncio.timeout(RECEIVE_WITHIN):
                return await self.controls.of_the_first(what, *arguments)
        except TimeoutError:
            raise FleetError(f"the transfer took more than {RECEIVE_WITHIN:.0f} s; open another one") from None
        except ENGINE_LOST:
            raise FleetError("the engine that receives died; call /init_weight_transfer_engine again") from None
        except RayTaskError as error:
            if isinstance(error.cause, RefusedUpdate):
                raise error.cause from None
            field = "update_info" if what == "receive" else "init_info"
            raise refused(field, f"the transfer failed: {in_words(error)}") from None
