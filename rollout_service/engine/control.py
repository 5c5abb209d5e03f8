"""EngineControl: what the control routes ask of one engine, besides generation and loading."""

import os
from typing import Any

from rollout_service.engine.pausing import EnginePausing
from rollout_service.engine.server_info import server_info
from rollout_service.engine.transfer import TransferReceiver
from rollout_service.engine.update_file import TensorRules


class EngineControl(EnginePausing):
    """The fleet calls its methods through `Engine.control`."""

    receiver: TransferReceiver | None = None

    async def abort_requests(self, request_ids: list[str] | None) -> int:
        """End the requests of these ids, or all. Returns the number of requests that were ended, as vLLM's own route
        counts them."""
        if request_ids is not None:
            await self.llm.abort(request_ids)
            return len(request_ids)
        known = self.llm.output_processor
        everything = [*known.request_states, *known.parent_requests]
        await self.llm.abort(everything, internal=True)
        return len(everything)

    async def reset_prefix_cache(self, running_requests: bool, external: bool) -> bool:
        """Whether the cache is empty now. Without `running_requests` it is not, as long as completions run."""
        return bool(await self.llm.reset_prefix_cache(running_requests, external))

    async def server_info(self, config_format: str) -> dict[str, Any]:
        return await server_info(self.llm.vllm_config, config_format)

    async def weight_checksums(self) -> dict[str, str]:
        """A checksum of each tensor and each packed layer of the policy, by rank and name."""
        ranks = await self.llm.collective_rpc("weight_checksums")
        return {name: checksum for rank in ranks for name, checksum in rank.items()}

    async def law_deviations(self, scale: int) -> dict[str, float]:
        """The standard deviations by which the first worker's sampler and verification differ from their law."""
        return (await self.llm.collective_rpc("law_deviations", args=(scale,)))[0]

    async def open_transfer(self, init_info: dict[str, Any]) -> str:
        """Join a trainer's group. Returns the name of the transport. Raises ValueError when `init_info` is wrong."""
        await self.close_transfer()
        receiver = self.receiver = TransferReceiver(self.llm.vllm_config, init_info)  # a later one takes its place
        await receiver.open(init_info)
        return receiver.backend

    async def close_transfer(self) -> None:
        if self.receiver is not None:
            receiver, self.receiver = self.receiver, None
            await receiver.close()

    async def receive(self, update_info: dict[str, Any], file: str, rules: TensorRules, written: set[str]) -> set[str]:
        """Receive tensors from the trainer into an update's file. Returns the names of all tensors that are written
        now. Raises ValueError when there is no transfer, or when this engine cannot reach the file."""
        if self.receiver is None:
            raise ValueError("this engine has no connection to a trainer; call /init_weight_transfer_engine first")
        if not os.path.exists(file):
            raise ValueError(
                "this engine is on another machine than the service's front, and a transfer needs both on one; push "
                "over POST /v1/weights/policy, or give a weight_dir"
            )
        return await self.receiver.receive(update_info, file, rules, written)
