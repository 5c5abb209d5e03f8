"""RolloutClient: the service from a trainer's side, sync and async. Needs neither vllm nor ray.

with RolloutClient("http://127.0.0.1:8000") as client:
    for group in client.rollouts([GroupRequest(prompt="2 + 2 =", n=8)]):
        ...
    client.push_weights("policy", tensors, version=1)
"""

import json
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from pydantic import BaseModel

from rollout_service.protocol import (
    Batch,
    BatchesStatus,
    ErrorBody,
    Group,
    GroupRequest,
    LeaseExtension,
    LeaseGroups,
    LeaseRequest,
    LeaseStatus,
    PromptsRequest,
    PromptsStatus,
    RolloutRequest,
    SharedMemoryPush,
    SpeculationStatus,
    WeightsOf,
    WeightsStatus,
    WeightStatus,
    spare_file,
)

if TYPE_CHECKING:
    import torch

STREAM_CHUNK = 1 << 20
JSON = {"Content-Type": "application/json"}


class RolloutError(RuntimeError):
    """The service refused or failed a request. `status` is the HTTP status, `body` what it said, `retry_after` the
    seconds after which it may be tried again, where the service says so."""

    def __init__(self, status: int, body: ErrorBody, retry_after: float | None = None):
        self.status, self.body, self.retry_after = status, body, retry_after
        details = "".join(f"\n  {p.field}: {p.message}" for p in body.problems)
        super().__init__(f"{status}: {body.error}{details}")


def _error(response: httpx.Response) -> RolloutError:
    try:
        body = ErrorBody.model_validate_json(response.content)
    except ValueError:
        body = ErrorBody(error=response.text[:500])
    after = response.headers.get("retry-after")
    return RolloutError(response.status_code, body, None if after is None else float(after))


def _group(line: str) -> Group:
    """One line of a rollout stream. Raises RolloutError for the line that says the stream could not be finished."""
    fields = json.loads(line)
    if "error" in fields:
        raise RolloutError(503, ErrorBody.model_validate(fields))
    return Group.model_validate(fields)


def _request(groups: Iterable[GroupRequest], model: str | None) -> bytes:
    request = RolloutRequest(groups=list(groups), model=model)
    return request.model_dump_json(exclude_none=True).encode()


class _Connection:
    def __init__(self, endpoint: str, token: str | None, timeout: float):
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        # A rollout stream is silent while the first group is generated: no limit on reading, one on connecting.
        self.options: dict[str, Any] = {
            "base_url": endpoint,
            "headers": headers,
            "timeout": httpx.Timeout(timeout, read=None),
        }


class RolloutClient(_Connection):
    """Blocking client. `timeout` limits connecting and writing, in seconds; reading waits for generation."""

    def __init__(self, endpoint: str, token: str | None = None, timeout: float = 30.0):
        super().__init__(endpoint, token, timeout)
        self.http = httpx.Client(**self.options)

    def __enter__(self) -> "RolloutClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def _get(self, path: str) -> bytes:
        response = self.http.get(path)
        if response.status_code != 200:
            raise _error(response)
        return response.content

    def rollouts(self, groups: Iterable[GroupRequest], model: str | None = None) -> Iterator[Group]:
        """Finished groups, each as it finishes. Closing the iterator ends the generation of the rest.

        Raises RolloutError: 4xx before anything is generated, naming the fields; 503 when the engines could not finish.
        """
        content = _request(groups, model)
        with self.http.stream("POST", "/v1/rollouts", content=content, headers=JSON) as response:
            if response.status_code != 200:
                response.read()
                raise _error(response)
            for line in response.iter_lines():
                yield _group(line)

    def weights(self) -> WeightsStatus:
        return WeightsStatus.model_validate_json(self._get("/v1/weights"))

    def speculation(self) -> SpeculationStatus:
        return SpeculationStatus.model_validate_json(self._get("/v1/speculation"))

    def model(self) -> dict[str, Any]:
        """The served policy: `id` (its name) and `max_model_len` (of prompt and response together)."""
        return json.loads(self._get("/v1/models"))["data"][0]

    def ready(self) -> bool:
        """Whether every engine answers."""
        try:
            return self.http.get("/ready", timeout=10.0).status_code == 200
        except httpx.HTTPError:
            return False

    def send_prompts(self, request: PromptsRequest) -> PromptsStatus:
        """Groups to generate in the background. Raises RolloutError: 429 when the queue is full (try again after
        `retry_after` seconds), 507 when its disk is; then none was taken."""
        return PromptsStatus.model_validate_json(self._post("/v1/prompts", request))

    def cancel_prompts(self, run: str) -> None:
        """Forget the run's groups that are not acknowledged."""
        response = self.http.delete("/v1/prompts", params={"run": run})
        if response.status_code != 200:
            raise _error(response)

    def return_leases(self, run: str) -> None:
        """Return all leased groups of the run: its trainer begins anew."""
        response = self.http.delete("/v1/batches", params={"run": run})
        if response.status_code != 200:
            raise _error(response)

    def lease(self, request: LeaseRequest) -> Batch:
        """Finished groups, and why if they are fewer than asked for."""
        return Batch.model_validate_json(self._post("/v1/batches/lease", request))

    def acknowledge(self, lease: str, groups: list[str] | None = None) -> LeaseStatus:
        """Trained on: the lease's groups, or those named, are never handed out again. RolloutError 404: it is over."""
        body = self._post(f"/v1/batches/{lease}/ack", LeaseGroups(groups=groups))
        return LeaseStatus.model_validate_json(body)

    def release(self, lease: str, groups: list[str] | None = None) -> LeaseStatus:
        """Not trained on: they are handed out again."""
        body = self._post(f"/v1/batches/{lease}/nack", LeaseGroups(groups=groups))
        return LeaseStatus.model_validate_json(body)

    def extend(self, lease: str, seconds: float) -> LeaseStatus:
        return LeaseStatus.model_validate_json(
            self._post(f"/v1/batches/{lease}/extend", LeaseExtension(seconds=seconds))
        )

    def batches(self) -> BatchesStatus:
        return BatchesStatus.model_validate_json(self._get("/v1/batches"))

    def _post(self, path: str, body: BaseModel) -> bytes:
        response = self.http.post(path, content=body.model_dump_json(exclude_none=True), headers=JSON)
        if response.status_code != 200:
            raise _error(response)
        return response.content

    def push_weights(self, of: WeightsOf, tensors: Mapping[str, "torch.Tensor"], version: int) -> WeightStatus:
        """Give all engines `tensors` (checkpoint names) as `version`; returns when every engine holds it.

        On the service's own machine the tensors go through shared memory, elsewhere over HTTP.
        Raises RolloutError with every wrong name, shape and dtype; the old version then stays in service.
        """
        from rollout_service.tensor_bytes import checksum_of, safetensors_parts

        parts = safetensors_parts(tensors)
        shared = self._shared_memory()
        if shared is None:
            headers = {"Content-Type": "application/octet-stream"}
            return self._push(of, version, checksum_of(parts), content=_chunks(parts), headers=headers)
        file = shared / f"push-{uuid.uuid4().hex}.safetensors"
        try:
            with ThreadPoolExecutor(1) as pool:
                checksum = pool.submit(checksum_of, parts)
                _write(shared / spare_file(of), file, parts)
            return self._push(of, version, checksum.result(), json=SharedMemoryPush(file=file.name).model_dump())
        finally:
            file.unlink(missing_ok=True)

    def _shared_memory(self) -> Path | None:
        """The service's shared-memory folder when it is this machine's: the `token` file in it is ours to read."""
        status = self.weights()
        folder = Path(status.shared_memory)
        try:
            here = (folder / "token").read_text()
        except OSError:
            return None
        return folder if here == folder.name else None

    def _push(self, of: WeightsOf, version: int, checksum: str, **body: Any) -> WeightStatus:
        query = {"version": str(version), "checksum": checksum}
        response = self.http.post(f"/v1/weights/{of}", params=query, **body)
        if response.status_code != 200:
            raise _error(response)
        return WeightStatus.model_validate_json(response.content)


def tensors_checksum(tensors: Mapping[str, "torch.Tensor"]) -> str:
    """BLAKE3 of the safetensors bytes that `push_weights` makes of `tensors`: `WeightStatus.checksum` once pushed."""
    from rollout_service.tensor_bytes import checksum_of, safetensors_parts

    return checksum_of(safetensors_parts(tensors))


def _write(spare: Path, file: Path, parts: Sequence[memoryview]) -> None:
    """Over the spare file, where there is one."""
    try:
        spare.rename(file)
    except FileNotFoundError:
        file.touch()
    with file.open("r+b") as out:
        out.writelines(parts)
        out.truncate()


def _chunks(parts: Iterable[memoryview]) -> Iterator[bytes]:
    for part in parts:
        for start in range(0, len(part), STREAM_CHUNK):
            yield bytes(part[start : start + STREAM_CHUNK])


class AsyncRolloutClient(_Connection):
    """The same for asyncio; weights are pushed by the blocking client, whose work is copying."""

    def __init__(self, endpoint: str, token: str | None = None, timeout: float = 30.0):
        super().__init__(endpoint, token, timeout)
        self.http = httpx.AsyncClient(**self.options)

    async def __aenter__(self) -> "AsyncRolloutClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()

    async def rollouts(self, groups: Iterable[GroupRequest], model: str | None = None) -> AsyncIterator[Group]:
        """As `RolloutClient.rollouts`."""
        content = _request(groups, model)
        async with self.http.stream("POST", "/v1/rollouts", content=content, headers=JSON) as response:
            if response.status_code != 200:
                await response.aread()
                raise _error(response)
            async for line in response.aiter_lines():
                yield _group(line)

    async def weights(self) -> WeightsStatus:
        return WeightsStatus.model_validate_json(await self._get("/v1/weights"))

    async def speculation(self) -> SpeculationStatus:
        return SpeculationStatus.model_validate_json(await self._get("/v1/speculation"))

    async def model(self) -> dict[str, Any]:
        """As `RolloutClient.model`."""
        return json.loads(await self._get("/v1/models"))["data"][0]

    async def _get(self, path: str) -> bytes:
        response = await self.http.get(path)
        if response.status_code != 200:
            raise _error(response)
        return response.content

    async def send_prompts(self, request: PromptsRequest) -> PromptsStatus:
        """Groups to generate in the background. Raises RolloutError: 429 when the queue is full (try again after
        `retry_after` seconds), 507 when its disk is; then none was taken."""
        return PromptsStatus.model_validate_json(await self._post("/v1/prompts", request))

    async def cancel_prompts(self, run: str) -> None:
        """Forget the run's groups that are not acknowledged."""
        response = await self.http.delete("/v1/prompts", params={"run": run})
        if response.status_code != 200:
            raise _error(response)

    async def return_leases(self, run: str) -> None:
        """Return all leased groups of the run: its trainer begins anew."""
        response = await self.http.delete("/v1/batches", params={"run": run})
        if response.status_code != 200:
            raise _error(response)

    async def lease(self, request: LeaseRequest) -> Batch:
        """Finished groups, and why if they are fewer than asked for."""
        return Batch.model_validate_json(await self._post("/v1/batches/lease", request))

    async def acknowledge(self, lease: str, groups: list[str] | None = None) -> LeaseStatus:
        """Trained on: the lease's groups, or those named, are never handed out again. RolloutError 404: it is over."""
        body = await self._post(f"/v1/batches/{lease}/ack", LeaseGroups(groups=groups))
        return LeaseStatus.model_validate_json(body)

    async def release(self, lease: str, groups: list[str] | None = None) -> LeaseStatus:
        """Not trained on: they are handed out again."""
        return LeaseStatus.model_validate_json(
            await self._post(f"/v1/batches/{lease}/nack", LeaseGroups(groups=groups))
        )

    async def extend(self, lease: str, seconds: float) -> LeaseStatus:
        return LeaseStatus.model_validate_json(
            await self._post(f"/v1/batches/{lease}/extend", LeaseExtension(seconds=seconds))
        )

    async def batches(self) -> BatchesStatus:
        return BatchesStatus.model_validate_json(await self._get("/v1/batches"))

    async def _post(self, path: str, body: BaseModel) -> bytes:
        response = await self.http.post(path, content=body.model_dump_json(exclude_none=True), headers=JSON)
        if response.status_code != 200:
            raise _error(response)
        return response.content
