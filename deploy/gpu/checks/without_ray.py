"""A stand-in for Ray, for a machine without it: an actor is an object of this process, and its methods are tasks.

`stand_in` puts it into Ray's place before the fleet is imported. An actor's errors come as they are, and none restarts.
"""

import asyncio
import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

NODE = "here"
OF_THE_START = "LD_PRELOAD", "LD_LIBRARY_PATH"
"""variables that a process reads only when it begins"""


class Actor:
    def __init__(self, actor: type, options: dict[str, Any], arguments: tuple[Any, ...]):
        variables = options["runtime_env"]["env_vars"]
        os.environ.update({name: value for name, value in variables.items() if name not in OF_THE_START})
        self.actor = actor(*arguments)

    def __getattr__(self, method: str) -> SimpleNamespace:
        call = getattr(self.actor, method)
        return SimpleNamespace(remote=lambda *arguments: asyncio.ensure_future(call(*arguments)))


def stand_in() -> None:
    ray, exceptions, util = (ModuleType(name) for name in ("ray", "ray.exceptions", "ray.util"))
    exceptions.RayError = error = type("RayError", (Exception,), {})
    for name in ("RayTaskError", "RayActorError", "ActorDiedError", "ActorUnavailableError", "AuthenticationError"):
        setattr(exceptions, name, type(name, (error,), {}))
    util.placement_group = util.remove_placement_group = None  # only a cluster that is joined needs them
    ray.exceptions, ray.util = exceptions, util
    ray.remote = lambda actor: SimpleNamespace(
        options=lambda **options: SimpleNamespace(remote=lambda *arguments: Actor(actor, options, arguments))
    )
    ray.is_initialized = lambda: True
    ray.kill = lambda actor, no_restart: None
    ray.nodes = lambda: [{"Alive": True, "NodeID": NODE}]
    # vLLM asks for `runtime_env` too
    ray.get_runtime_context = lambda: SimpleNamespace(get_node_id=lambda: NODE, runtime_env=None)
    sys.modules |= {module.__name__: module for module in (ray, exceptions, util)}
