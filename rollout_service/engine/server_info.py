"""Server info: vLLM's configuration, settings and system of an engine, without secrets.

TRL's trainers read it before they train: `weight_transfer_config` must not be null, and `logprobs_mode` must be that of
the log-probabilities that they expect.
"""

import asyncio
import os
import re
from collections.abc import Collection
from typing import Any

SECRET = re.compile(r"(^|_)(token|key|secret|password|credentials?)$", re.IGNORECASE)
"""the end of the name of a setting or variable that holds a secret"""
HIDDEN = "(hidden)"
SHORTEST_SECRET = 6
"""characters; a shorter value would be hidden inside of words"""
TRANSFERS = {"cuda": ["nccl", "ipc", "weight_dir", "file"], "cpu": ["weight_dir", "file"]}
"""by device: what `update_info` may hold, the usual one first; the first two are vLLM's own transfers"""


async def server_info(vllm_config: Any, config_format: str) -> dict[str, Any]:
    """As vLLM's own route gives it. `config_format`: "json" or "text"."""
    from pydantic import TypeAdapter
    from vllm.config import VllmConfig
    from vllm.entrypoints.serve.dev.server_info import api_router

    if config_format == "json":
        config: Any = TypeAdapter(VllmConfig).dump_python(vllm_config, mode="json", fallback=str)
        offered = TRANSFERS.get(vllm_config.device_config.device_type, TRANSFERS["cpu"])
        config["weight_transfer_config"] = {"backend": offered[0], "offered": offered}
    else:
        config = str(vllm_config)
    info = {
        "vllm_config": config,
        "vllm_env": api_router._get_vllm_env_vars(),
        "system_env": await asyncio.to_thread(api_router._get_system_env_info_cached),
    }
    hub_token = vllm_config.model_config.hf_token
    return without_secrets(info, [*secrets_of_the_environment(), *([hub_token] if isinstance(hub_token, str) else [])])


def secrets_of_the_environment() -> list[str]:
    return [value for name, value in os.environ.items() if SECRET.search(name)]


def without_secrets(part: Any, values: Collection[str]) -> Any:
    """A JSON value without the text of settings whose name says that they are secret, and without the secret
    `values` wherever they stand."""
    if isinstance(part, dict):
        return {
            name: HIDDEN if isinstance(value, str) and SECRET.search(str(name)) else without_secrets(value, values)
            for name, value in part.items()
        }
    if isinstance(part, list | tuple):
        return [without_secrets(value, values) for value in part]
    if isinstance(part, str):
        for value in values:
            if len(value) >= SHORTEST_SECRET:
                part = part.replace(value, HIDDEN)
    return part
