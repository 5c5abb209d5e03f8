"""prime-rl's inference client (src/prime_rl/utils/client.py), or its requests.

prime-rl is no package of an index. If PRIME_RL names a clone of its repository, its own client runs, unmodified, at the
commit below. Otherwise this script sends the requests that the client sends at that commit, and the table says so.
"""

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
from checks import MODEL, POLICY, Checks, equal

COMMIT = "559b44772e471d1538537b8805cc77f3824a5e64"
SOURCES = "src/prime_rl/utils", "packages/prime-rl-configs/src"
checks = Checks("verifiers")
checks.version = COMMIT[:7]


def own_client(clone: str) -> tuple[Callable[[], Awaitable[None]], Callable[[Path], Awaitable[None]]]:
    """prime-rl's `wait_for_ready` and `update_weights`, from a clone of its repository."""
    folder = Path(tempfile.mkdtemp())
    archive = subprocess.run(["git", "-C", clone, "archive", COMMIT, *SOURCES], check=True, capture_output=True).stdout
    subprocess.run(["tar", "x", "-C", str(folder)], input=archive, check=True)
    sys.path += [str(folder / "src"), str(folder / "packages" / "prime-rl-configs" / "src")]
    from prime_rl.configs.shared import ClientConfig
    from prime_rl.utils.client import InferencePool

    def pool() -> InferencePool:
        return InferencePool(ClientConfig(base_url=f"{checks.endpoint}/v1"), MODEL)

    async def ready() -> None:
        await pool().wait_for_ready(MODEL, timeout=10)

    async def update(folder: Path) -> None:
        await pool().update_weights(folder, step=1)

    return ready, update


async def recorded_ready() -> None:
    """/health must answer 200, and /v1/models must list the model."""
    async with httpx.AsyncClient(base_url=checks.endpoint) as http:
        (await http.get("/health")).raise_for_status()
        assert any(model["id"] == MODEL for model in (await http.get("/v1/models")).json()["data"])


async def recorded_update(folder: Path) -> None:
    """Pause, write a mark into the folder, update, and resume whatever happened."""
    async with httpx.AsyncClient(base_url=checks.endpoint, timeout=300) as http:
        pause = await http.post("/pause", params={"mode": "keep", "clear_cache": "false"})
        pause.raise_for_status()
        try:
            (folder / "NCCL_READY").touch()
            (await http.post("/update_weights", json={"weight_dir": folder.as_posix()})).raise_for_status()
        finally:
            (await http.post("/resume")).raise_for_status()


CLONE = os.environ.get("PRIME_RL")
ready, update = own_client(CLONE) if CLONE else (recorded_ready, recorded_update)
HOW = "its own client" if CLONE else "its requests, recorded from its source"


@checks.call("wait_for_ready")
async def is_ready() -> str:
    await ready()
    return HOW


@checks.call("update_weights from a folder: pause, update_weights, resume")
async def updates() -> str:
    folder = Path(tempfile.mkdtemp()) / "step_1"
    shutil.copytree(POLICY, folder)
    async with httpx.AsyncClient(base_url=checks.endpoint, timeout=60) as http:
        before = (await http.get("/v1/weights")).json()["policy"]["version"]
        body = {"model": MODEL, "prompt": "1 + 2 =\n", "max_tokens": 24}
        during = asyncio.create_task(http.post("/v1/completions", json=body))
        await update(folder)
        equal((await during).status_code, 200, "a completion that ran meanwhile")
        after = (await http.get("/v1/weights")).json()["policy"]["version"]
        equal((await http.get("/is_paused")).json()["is_paused"], False, "paused")
    equal(after, before + 1, "the weight version")
    return f"{HOW}; version {after}"


@checks.call("prefill scores: /inference/v1/generate with prompt_logprobs")
async def scores() -> str:
    tokens = [5, 6, 7, 8, 9]
    sampling = {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "prompt_logprobs": 1}
    async with httpx.AsyncClient(base_url=checks.endpoint, timeout=60) as http:
        body = {"model": MODEL, "token_ids": tokens, "sampling_params": sampling}
        answer = await http.post("/inference/v1/generate", json=body)
        answer.raise_for_status()
    found = answer.json()["prompt_logprobs"]
    equal((len(found), found[0]), (len(tokens), None), "entries, and the first of them")
    assert all(next(iter(entry.values()))["logprob"] <= 0 for entry in found[1:])
    return "the request, recorded from its source: its own function needs vLLM"
