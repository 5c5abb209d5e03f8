"""RewardsPool: rewards computed in worker processes, with a time limit for each reward.

A reward that hangs, raises, or ends its process comes back as None; tasks/rewards.py says what that costs. Each slot
is a thread with a worker process behind a pipe. A worker that exceeds the limit is killed, and a new one replaces it.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from rl_loop.tasks.task import Task, TaskProblem, finite_reward

logger = logging.getLogger("rl_loop")

START_WITHIN = 300.0
"""seconds that a worker has for its imports and for making its task"""
PARENT_CHECK = 1.0
"""seconds between checks that the trainer is still alive"""


class RewardsPool:
    """A context manager. Each worker calls `make_task`, so it must be picklable (functools.partial is)."""

    def __init__(self, make_task: Callable[[], Task], processes: int, timeout: float):
        self.make_task, self.timeout = make_task, timeout
        self.local = threading.local()
        self.workers: set[_Worker] = set()
        self.lock = threading.Lock()
        self.is_closed = False
        self.last_failure = ""
        self.threads = ThreadPoolExecutor(processes, thread_name_prefix="rewards")

    def __enter__(self) -> "RewardsPool":
        return self

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.is_closed = True
            workers = list(self.workers)
        for worker in workers:
            worker.end()
        self.threads.shutdown(cancel_futures=True)

    def submit(self, problem: TaskProblem, responses: Sequence[str]) -> list[Future[float | None]]:
        """Each response's reward, or None if it failed or took longer than the limit."""
        return [self.threads.submit(self._reward, problem, response) for response in responses]

    def _reward(self, problem: TaskProblem, response: str) -> float | None:
        worker = getattr(self.local, "worker", None)
        if worker is None:
            with self.lock:
                if self.is_closed:
                    return None
                worker = self.local.worker = _Worker(self.make_task)
                self.workers.add(worker)
        try:
            return worker.reward(problem, response, self.timeout)
        except _RewardRaised as error:
            self.last_failure = str(error)
            logger.warning("a reward raised, so its completion is left out: %s", error)
        except (TimeoutError, EOFError, OSError) as error:
            if not self.is_closed:
                what = f"took over {self.timeout} s" if isinstance(error, TimeoutError) else "ended its process"
                self.last_failure = f"it {what}"
                logger.warning("a reward %s, so its completion is left out", what)
            worker.end()
            with self.lock:
                self.workers.discard(worker)
            self.local.worker = None
        return None


class _RewardRaised(RuntimeError):
    pass


class _Worker:
    def __init__(self, make_task: Callable[[], Task]):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make_task, list(sys.path)), daemon=True)
        self.process.start()
        theirs.close()
        self.is_ready = False

    def reward(self, problem: TaskProblem, response: str, timeout: float) -> float:
        if not self.is_ready:  # the time for its imports does not count as the reward's
            self._receive(START_WITHIN)
            self.is_ready = True
        self.pipe.send((problem, response))
        value, error = self._receive(timeout)
        if error is not None:
            raise _RewardRaised(error)
        return value

    def _receive(self, timeout: float) -> Any:
        if not self.pipe.poll(timeout):
            raise TimeoutError
        return self.pipe.recv()

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def _serve(pipe: Connection, make_task: Callable[[], Task], path: list[str]) -> None:
    """The worker's loop. It ends when the pipe closes or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the trainer ends its workers itself
    sys.path[:] = path
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    task = make_task()
    pipe.send(None)
    while True:
        try:
            problem, response = pipe.recv()
        except EOFError:
            return
        try:
            answer = finite_reward(task, problem, response), None
        except Exception as error:
            answer = None, f"{type(error).__name__}: {error}"  # type: ignore[assignment]
        pipe.send(answer)


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK)
    os._exit(1)
