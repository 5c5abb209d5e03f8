"""Methods: every call as a method of both clients. A client's own `send` decides what a method returns."""

from collections.abc import Callable, Coroutine
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar, overload

from rollout_service.client import calls
from rollout_service.client.connection import Call, Connection

if TYPE_CHECKING:
    from rollout_service.client.async_client import AsyncRolloutClient
    from rollout_service.client.rollout_client import RolloutClient

P = ParamSpec("P")
T = TypeVar("T", covariant=True)


class Method(Generic[P, T]):
    """A call as a method. The blocking client returns the value of the answer, the asyncio client a coroutine."""

    def __init__(self, call: Callable[Concatenate[Connection, P], Call[T]]):
        self.call = call

    @overload
    def __get__(self, client: "RolloutClient", of: type) -> Callable[P, T]: ...
    @overload
    def __get__(self, client: "AsyncRolloutClient", of: type) -> Callable[P, Coroutine[Any, Any, T]]: ...
    def __get__(self, client: Any, of: type) -> Any:
        if client is None:  # on the class itself, where help() reads it
            return self.call

        @wraps(self.call)
        def method(*args: P.args, **kwargs: P.kwargs) -> Any:
            return client.send(self.call(client, *args, **kwargs))

        return method


class Methods(Connection):
    """The methods of both clients. calls.py describes each of them."""

    weights = Method(calls.weights)
    speculation = Method(calls.speculation)
    model = Method(calls.model)
    send_prompts = Method(calls.send_prompts)
    cancel_prompts = Method(calls.cancel_prompts)
    return_leases = Method(calls.return_leases)
    lease = Method(calls.lease)
    acknowledge = Method(calls.acknowledge)
    release = Method(calls.release)
    extend = Method(calls.extend)
    batches = Method(calls.batches)
    release_weights = Method(calls.release_weights)
    engines = Method(calls.engines)
    scale = Method(calls.scale)
