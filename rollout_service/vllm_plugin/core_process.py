"""Core process of vLLM: forked from a server that imports vLLM while the actor does the same, which saves seconds.

vLLM would spawn it after the actor's imports, and it would import everything again. The actor itself cannot be forked,
because Ray has threads in it. The server has no threads (except OpenBLAS's, which handle forks) and does nothing else.
This is right on a GPU too: importing initialises no device, and outside of Ray vLLM itself forks after its imports.

A core process that fails tells the actor why. vLLM itself only writes the reason to a log, and says "see root cause
above".
"""

import contextlib
import multiprocessing
import os
from collections.abc import Iterator
from importlib import import_module
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

from rollout_service.vllm_plugin.patch import Patch

NAME = "vllm.v1.engine.utils.get_mp_context"
LONGEST_REASON = 4096
"""characters of the reason why a core process failed; a pipe holds that many even if nobody reads it"""


class CoreFailed(RuntimeError):
    """vLLM's core process ended with an error. The message is that error."""


class CoreProcess(ForkServerProcess):
    """It has the environment of the process that asks for it, as a spawned process has. vLLM adds to that."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.environment = dict(os.environ)
        self.heard, self.tells = multiprocessing.Pipe(duplex=False)
        STARTED.append(self)

    def run(self) -> None:
        # Only what differs, because a process whose whole environment moves can no longer change its title.
        os.environ.update(dict(self.environment.items() - os.environ.items()))
        try:
            super().run()
        except Exception as error:
            self.tells.send(f"{type(error).__name__}: {error}"[:LONGEST_REASON])
            raise

    def reason(self) -> str | None:
        """Why it failed; None if it has not."""
        return self.heard.recv() if self.heard.poll() else None


STARTED: list[CoreProcess] = []
"""core processes that this process has started"""


@contextlib.contextmanager
def says_why_it_failed() -> Iterator[None]:
    """A context in which vLLM starts its core process. Raises CoreFailed with the error of the core process itself. If
    it gave none, as when it was killed, vLLM's error stays."""
    try:
        yield
    except RuntimeError as error:
        reasons = [reason for core in STARTED if (reason := core.reason()) is not None]
        if not reasons:
            raise
        raise CoreFailed(reasons[0]) from error


class CoreContext(ForkServerContext):
    Process = CoreProcess  # type: ignore[assignment]


def prepare_core_process() -> None:
    """Start the server. It imports while this process continues."""
    multiprocessing.set_forkserver_preload(["rollout_service.vllm_plugin.preloaded"])
    forkserver.ensure_running()


def fork_core_process() -> None:
    """Let vLLM take its core process from the server. Its workers for several GPUs are still spawned."""
    utils: Any = import_module("vllm.v1.engine.utils")

    stock = utils.get_mp_context

    def get_mp_context() -> CoreContext:
        stock()  # sets what the core process inherits
        return CoreContext()

    utils.get_mp_context = get_mp_context


CORE_PROCESS = Patch(
    NAME,
    "it returns a context that spawns the core process, which then imports vLLM again and starts seconds later",
    when="in each engine's actor, on every device, before it starts vLLM",
    unneeded="vLLM can be told how to start its core process",
    apply=fork_core_process,
    shown_by="tests/integration/test_core_server.py::test_vllm_takes_its_core_process_from_it",
    relies_on={NAME: ""},
    looked_up_in={"vllm.v1.engine.utils.CoreEngineProcManager.__init__": "get_mp_context"},
)
