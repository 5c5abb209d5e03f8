"""RolloutClient: the blocking client of the service, for trainers. Needs neither vllm nor ray.

with RolloutClient("http://127.0.0.1:8000") as client:
    for group in client.rollouts([GroupRequest(prompt="2 + 2 =", n=8)]):
        ...
    client.push_weights("policy", tensors, version=1)

Raises RolloutError when the service refuses or fails a request, or when a gateway answers in its place. Raises
httpx.TransportError when there is no answer, and EndpointError when the endpoint is not an address, is unreachable, or
has a certificate that is not trusted.
"""

from collections.abc import Generator, Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar

import httpx

from rollout_service import transports
from rollout_service.client import calls
from rollout_service.client.answers import GroupStream, error_of
from rollout_service.client.connection import Call
from rollout_service.client.methods import Methods
from rollout_service.protocol import Group, GroupRequest, WeightsOf, WeightStatus

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class RolloutClient(Methods):
    """Blocking client. `timeout` limits connecting and writing, and `read_timeout` limits the wait for an answer, in
    seconds. Calls that may take longer have limits of their own (calls.py). `ca_file` is the PEM file of the authority
    behind an https endpoint's certificate, if it is none of the system's."""

    http: httpx.Client

    def opened(self) -> httpx.Client:
        return httpx.Client(**self.options, transport=httpx.HTTPTransport(**self.route.transport))

    def __enter__(self) -> "RolloutClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def send(self, call: Call[T]) -> T:
        """The value of the call's answer."""
        with self.route.explained():
            answer = self.http.request(**self.request(call))
        return call.read(answer, self.route.via)

    def rollouts(self, groups: Iterable[GroupRequest], model: str | None = None) -> Generator[Group]:
        """Finished groups, each as it finishes. Closing the iterator ends the generation of the rest.

        Raises RolloutError with 4xx, naming the wrong fields, before anything is generated; with 503 when the engines
        could not finish; and with 422, after all other groups, when single groups failed (`failed` says which and why).
        """
        requested = list(groups)
        stream, request = GroupStream(len(requested)), self.request(calls.rollouts(requested, model))
        with self.route.explained(), self.http.stream(**request) as answer:
            if answer.status_code != 200:
                answer.read()
                raise error_of(answer, self.route.via)
            for chunk in answer.iter_bytes():
                yield from stream.feed(chunk)
            yield from stream.end()

    def ready(self, within: float = 10.0) -> bool:
        """Whether every engine answers. `within`: as in `model`."""
        try:
            return self.http.get("/ready", timeout=within).status_code == 200
        except httpx.HTTPError:
            return False

    def push_weights(
        self,
        of: WeightsOf,
        tensors: Mapping[str, "torch.Tensor"],
        version: int,
        run: str | None = None,
        take_over: bool = False,
    ) -> WeightStatus:
        """Push `tensors`, by checkpoint name, as `version`; returns when every engine holds it.

        On the service's own machine the tensors go through shared memory, elsewhere over HTTP.
        The version belongs to `run` until `release_weights`. Without `run` any run may replace it. Raises RolloutError
        with every wrong name, shape and dtype. Raises it with 409 when the version in service belongs to another run,
        unless this push says `take_over`. In both cases the old version stays in service.
        """
        from rollout_service.tensor_bytes import safetensors_parts

        parts = safetensors_parts(tensors)
        with transports.sender(self.weights()).send(of, parts) as push:
            return self.send(calls.push(of, version, run, take_over, push))


def tensors_checksum(tensors: Mapping[str, "torch.Tensor"]) -> str:
    """BLAKE3 of the safetensors bytes that `push_weights` makes of `tensors`. After the push, `WeightStatus.checksum`
    equals it."""
    from rollout_service.tensor_bytes import checksum_of, safetensors_parts

    return checksum_of(safetensors_parts(tensors))
