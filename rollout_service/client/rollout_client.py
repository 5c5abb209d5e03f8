"""RolloutClient: the service from a trainer's side, sync and async. Needs neither vllm nor ray.

with RolloutClient("http://127.0.0.1:8000") as client:
    for group in client.rollouts([GroupRequest(prompt="2 + 2 =", n=8)]):
        ...
    client.push_weights("policy", tensors, version=1)

Raises RolloutError for what the service refuses or fails, and for what a gateway answers in its place;
httpx.TransportError when there is no answer; EndpointError for an endpoint that is no address, or cannot be reached.
"""

import uuid
from collections.abc import AsyncIterator, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
from pydantic import BaseModel

from rollout_service.client.answers import GroupStream, RolloutError, error_of, read, served_model
from rollout_service.client.transport import PUSH_TIMEOUT, STREAM_SILENCE, Route
from rollout_service.endpoint import EndpointError
from rollout_service.protocol import (
    INTERFACE_VERSION,
    VERSION_HEADER,
    Batch,
    BatchesStatus,
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

__all__ = ["AsyncRolloutClient", "EndpointError", "GroupStream", "RolloutClient", "RolloutError", "tensors_checksum"]

T = TypeVar("T", bound=BaseModel)

STREAM_CHUNK = 1 << 20
JSON = {"Content-Type": "application/json"}


class _Connection:
    def __init__(self, endpoint: str, token: str | None, timeout: float, read_timeout: float):
        self.timeout, self.read_timeout, self.route = timeout, read_timeout, Route(endpoint)
        headers = {VERSION_HEADER: str(INTERFACE_VERSION)} | ({"Authorization": f"Bearer {token}"} if token else {})
        self.options: dict[str, Any] = {
            "base_url": endpoint,
            "headers": headers,
            "timeout": self._waiting(read_timeout),
        }

    def _waiting(self, read: float, connect: float | None = None) -> httpx.Timeout:
        return httpx.Timeout(connect or self.timeout, read=read)

    def _extending(self, seconds: float) -> float:
        """Seconds to wait for the answer that a lease of so many is extended: time is left for another try."""
        return min(self.read_timeout, max(1.0, seconds / 4))


def _stream(groups: list[GroupRequest], model: str | None) -> dict[str, Any]:
    """Arguments of the request for a rollout stream."""
    content = RolloutRequest(groups=groups, model=model).model_dump_json(exclude_none=True).encode()
    return {"method": "POST", "url": "/v1/rollouts", "content": content, "headers": JSON}


def _json(body: BaseModel) -> dict[str, Any]:
    return {"content": body.model_dump_json(exclude_none=True).encode(), "headers": JSON}


class RolloutClient(_Connection):
    """Blocking client. `timeout` limits connecting and writing, `read_timeout` the wait for an answer, in seconds; what
    may take longer has limits of its own (transport.py)."""

    def __init__(self, endpoint: str, token: str | None = None, timeout: float = 30.0, read_timeout: float = 60.0):
        super().__init__(endpoint, token, timeout, read_timeout)
        self.http = httpx.Client(**self.options, transport=httpx.HTTPTransport(**self.route.transport))

    def __enter__(self) -> "RolloutClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def _send(
        self, method: str, path: str, wait: float | None = None, connect: float | None = None, **request: Any
    ) -> httpx.Response:
        """`wait` in place of `read_timeout`, `connect` in place of `timeout`."""
        waiting = self._waiting(wait or self.read_timeout, connect)
        with self.route.explained():
            return self.http.request(method, path, timeout=waiting, **request)

    def _get(self, of: type[T], path: str) -> T:
        return read(of, self._send("GET", path), self.route.via)

    def _post(self, of: type[T], path: str, body: BaseModel, wait: float | None = None) -> T:
        return read(of, self._send("POST", path, wait, **_json(body)), self.route.via)

    def _delete(self, path: str, **params: str) -> None:
        answer = self._send("DELETE", path, params=params)
        if answer.status_code != 200:
            raise error_of(answer, self.route.via)

    def rollouts(self, groups: Iterable[GroupRequest], model: str | None = None) -> Generator[Group]:
        """Finished groups, each as it finishes. Closing the iterator ends the generation of the rest.

        Raises RolloutError: 4xx before anything is generated, naming the fields; 503 when the engines could not finish;
        422 at the end when single groups failed (`failed` says which and why), after all others.
        """
        requested = list(groups)
        stream, waiting = GroupStream(len(requested)), self._waiting(STREAM_SILENCE)
        with (
            self.route.explained(),
            self.http.stream(**_stream(requested, model), timeout=waiting) as response,
        ):
            if response.status_code != 200:
                response.read()
                raise error_of(response, self.route.via)
            for chunk in response.iter_bytes():
                yield from stream.feed(chunk)
            yield from stream.end()

    def weights(self) -> WeightsStatus:
        return self._get(WeightsStatus, "/v1/weights")

    def speculation(self) -> SpeculationStatus:
        return self._get(SpeculationStatus, "/v1/speculation")

    def model(self, within: float | None = None) -> dict[str, Any]:
        """The served policy: `id` (its name) and `max_model_len` (of prompt and response together). `within`: seconds
        to connect in, and then to wait for the answer, in place of `timeout` and `read_timeout`."""
        return served_model(self._send("GET", "/v1/models", wait=within, connect=within), self.route.via)

    def ready(self, within: float = 10.0) -> bool:
        """Whether every engine answers. `within`: as in `model`."""
        try:
            return self.http.get("/ready", timeout=within).status_code == 200
        except httpx.HTTPError:
            return False

    def send_prompts(self, request: PromptsRequest) -> PromptsStatus:
        """Groups to generate in the background. Raises RolloutError: 429 when the queue is full (try again after
        `retry_after` seconds), 507 when its disk is; then none was taken."""
        return self._post(PromptsStatus, "/v1/prompts", request)

    def cancel_prompts(self, run: str) -> None:
        """Forget the run's groups that are not acknowledged."""
        self._delete("/v1/prompts", run=run)

    def return_leases(self, run: str) -> None:
        """Return all leased groups of the run: its trainer begins anew."""
        self._delete("/v1/batches", run=run)

    def lease(self, request: LeaseRequest) -> Batch:
        """Finished groups, and why if they are fewer than asked for."""
        return self._post(Batch, "/v1/batches/lease", request, request.wait + self.read_timeout)

    def acknowledge(self, lease: str, groups: list[str] | None = None) -> LeaseStatus:
        """Trained on: the lease's groups, or those named, are never handed out again. RolloutError 404: it is over."""
        return self._post(LeaseStatus, f"/v1/batches/{lease}/ack", LeaseGroups(groups=groups))

    def release(self, lease: str, groups: list[str] | None = None) -> LeaseStatus:
        """Not trained on: they are handed out again."""
        return self._post(LeaseStatus, f"/v1/batches/{lease}/nack", LeaseGroups(groups=groups))

    def extend(self, lease: str, seconds: float) -> LeaseStatus:
        path, body = f"/v1/batches/{lease}/extend", LeaseExtension(seconds=seconds)
        return self._post(LeaseStatus, path, body, self._extending(seconds))

    def batches(self) -> BatchesStatus:
        return self._get(BatchesStatus, "/v1/batches")

    def push_weights(
        self,
        of: WeightsOf,
        tensors: Mapping[str, "torch.Tensor"],
        version: int,
        run: str | None = None,
        take_over: bool = False,
    ) -> WeightStatus:
        """Give all engines `tensors` (checkpoint names) as `version`; returns when every engine holds it.

        On the service's own machine the tensors go through shared memory, elsewhere over HTTP.
        The version belongs to `run` until `release_weights`. Without a run it is nobody's, and anyone may replace it.
        Raises RolloutError with every wrong name, shape and dtype, and 409 when the version in service belongs to
        another run, unless this one is to `take_over`; the old version then stays in service.
        """
        from rollout_service.tensor_bytes import checksum_of, safetensors_parts

        parts = safetensors_parts(tensors)
        query = {"version": str(version)} | ({"run": run} if run else {}) | ({"take_over": "true"} if take_over else {})
        shared = self._shared_memory()
        if shared is None:
            headers = {"Content-Type": "application/octet-stream"}
            return self._push(of, query, checksum_of(parts), content=_chunks(parts), headers=headers)
        file = shared / f"push-{uuid.uuid4().hex}.safetensors"
        try:
            with ThreadPoolExecutor(1) as pool:
                checksum = pool.submit(checksum_of, parts)
                _write(shared / spare_file(of), file, parts)
            return self._push(of, query, checksum.result(), json=SharedMemoryPush(file=file.name).model_dump())
        finally:
            file.unlink(missing_ok=True)

    def release_weights(self, run: str) -> None:
        """The run ends: its weights stay in service and are nobody's. Nothing happens where it has none."""
        self._delete("/v1/weights", run=run)

    def _shared_memory(self) -> Path | None:
        """The service's shared-memory folder when it is this machine's: the `token` file in it is ours to read."""
        status = self.weights()
        folder = Path(status.shared_memory)
        try:
            here = (folder / "token").read_text(encoding="utf-8")
        except OSError:
            return None
        return folder if here == folder.name else None

    def _push(self, of: WeightsOf, query: dict[str, str], checksum: str, **body: Any) -> WeightStatus:
        params = query | {"checksum": checksum}
        answer = self._send("POST", f"/v1/weights/{of}", PUSH_TIMEOUT, params=params, **body)
        return read(WeightStatus, answer, self.route.via)


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

    def __init__(self, endpoint: str, token: str | None = None, timeout: float = 30.0, read_timeout: float = 60.0):
        super().__init__(endpoint, token, timeout, read_timeout)
        self.http = httpx.AsyncClient(**self.options, transport=httpx.AsyncHTTPTransport(**self.route.transport))

    async def __aenter__(self) -> "AsyncRolloutClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()

    async def _send(self, method: str, path: str, wait: float | None = None, **request: Any) -> httpx.Response:
        with self.route.explained():
            return await self.http.request(method, path, timeout=self._waiting(wait or self.read_timeout), **request)

    async def _get(self, of: type[T], path: str) -> T:
        return read(of, await self._send("GET", path), self.route.via)

    async def _post(self, of: type[T], path: str, body: BaseModel, wait: float | None = None) -> T:
        return read(of, await self._send("POST", path, wait, **_json(body)), self.route.via)

    async def _delete(self, path: str, **params: str) -> None:
        answer = await self._send("DELETE", path, params=params)
        if answer.status_code != 200:
            raise error_of(answer, self.route.via)

    async def rollouts(self, groups: Iterable[GroupRequest], model: str | None = None) -> AsyncIterator[Group]:
        """As `RolloutClient.rollouts`."""
        requested = list(groups)
        stream, waiting = GroupStream(len(requested)), self._waiting(STREAM_SILENCE)
        with self.route.explained():
            async with self.http.stream(**_stream(requested, model), timeout=waiting) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise error_of(response, self.route.via)
                async for chunk in response.aiter_bytes():
                    for group in stream.feed(chunk):
                        yield group
                for group in stream.end():
                    yield group

    async def weights(self) -> WeightsStatus:
        return await self._get(WeightsStatus, "/v1/weights")

    async def speculation(self) -> SpeculationStatus:
        return await self._get(SpeculationStatus, "/v1/speculation")

    async def model(self) -> dict[str, Any]:
        """As `RolloutClient.model`."""
        return served_model(await self._send("GET", "/v1/models"), self.route.via)

    async def send_prompts(self, request: PromptsRequest) -> PromptsStatus:
        """As `RolloutClient.send_prompts`."""
        return await self._post(PromptsStatus, "/v1/prompts", request)

    async def cancel_prompts(self, run: str) -> None:
        """Forget the run's groups that are not acknowledged."""
        await self._delete("/v1/prompts", run=run)

    async def return_leases(self, run: str) -> None:
        """Return all leased groups of the run: its trainer begins anew."""
        await self._delete("/v1/batches", run=run)

    async def lease(self, request: LeaseRequest) -> Batch:
        """Finished groups, and why if they are fewer than asked for."""
        return await self._post(Batch, "/v1/batches/lease", request, request.wait + self.read_timeout)

    async def acknowledge(self, lease: str, groups: list[str] | None = None) -> LeaseStatus:
        """Trained on: the lease's groups, or those named, are never handed out again. RolloutError 404: it is over."""
        return await self._post(LeaseStatus, f"/v1/batches/{lease}/ack", LeaseGroups(groups=groups))

    async def release(self, lease: str, groups: list[str] | None = None) -> LeaseStatus:
        """Not trained on: they are handed out again."""
        return await self._post(LeaseStatus, f"/v1/batches/{lease}/nack", LeaseGroups(groups=groups))

    async def extend(self, lease: str, seconds: float) -> LeaseStatus:
        path, body = f"/v1/batches/{lease}/extend", LeaseExtension(seconds=seconds)
        return await self._post(LeaseStatus, path, body, self._extending(seconds))

    async def batches(self) -> BatchesStatus:
        return await self._get(BatchesStatus, "/v1/batches")
