"""Core process of vLLM: forked from a server that imports vLLM while the actor does the same, which saves seconds.

vLLM would spawn it once the actor has done, and it would import everything again. A fork of the actor itself is out of
the question: Ray has threads in it. The server has none (but OpenBLAS's, which know of forks) and does nothing else, on
a GPU as well: importing initialises no device, and outside of Ray it is vLLM's own way to fork after it.

A core process that fails tells the actor why. vLLM itself writes that to a log, and says "see root cause above".
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
"""characters of why a core process failed: a pipe holds them, although nobody reads"""


class CoreFailed(RuntimeError):
    """vLLM's core process ended with an error, which is the message."""


class CoreProcess(ForkServerProcess):
    """With the environment of the process that asks for it, as one that is spawned has it: vLLM adds to that."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.environment = dict(os.environ)
        self.heard, self.tells = multiprocessing.Pipe(duplex=False)
        STARTED.append(self)

    def run(self) -> None:
        # Only what differs: where all of it moves, a process can no longer change its title.
        os.environ.update(dict(self.environment.items() - os.environ.items()))
        try:
            super().run()
        except Exception as error:
            self.tells.send(f"{type(error).__name__}: {error}"[:LONGEST_REASON])
            raise

    def reason(self) -> str | None:
        """Why it failed, once it has."""
        return self.heard.recv() if self.heard.poll() else None


STARTED: list[CoreProcess] = []
"""by this process"""


@contextlib.contextmanager
def says_why_it_failed() -> Iterator[None]:
    """Where vLLM starts its core process: raises CoreFailed with that one's own error. Without one, or where it was
    killed, vLLM's error stays."""
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
    """Start the server; it imports while this process goes on."""
    multiprocessing.set_forkserver_preload(["rollout_service.vllm_plugin.preloaded"])
    forkserver.ensure_running()


def fork_core_process() -> None:
    """Have vLLM take its core process from the server. Its workers, of several GPUs, are spawned as ever."""
    utils: Any = import_module("vllm.v1.engine.utils")

    stock = utils.get_mp_context

    def get_mp_context() -> CoreContext:
        stock()  # sets what the core process inherits
        return CoreContext()

    utils.get_mp_context = get_mp_context


CORE_PROCESS = Patch(
    NAME,
    "it gives a context that spawns the core process, which imports vLLM again: seconds later than a fork that has it",
    when="in each engine's actor, before it starts vLLM",
    unneeded="vLLM can be told how to start its core process",
    apply=fork_core_process,
    shown_by="tests/integration/test_core_server.py::test_vllm_takes_its_core_process_from_it",
    relies_on={NAME: ""},
    looked_up_in={"vllm.v1.engine.utils.CoreEngineProcManager.__init__": "get_mp_context"},
)
