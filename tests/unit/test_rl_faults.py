"""Random deaths of trainer and front, with toys: like tests/integration/faults without real processes, but often.

    FAULTS=100 SEED=1 pytest tests/unit/test_rl_faults.py

The trainer dies before or after one of its effects. The front dies between two requests or before it answers one. Its
queue is in a file, and leases end at any time. All parts except the engine are the real ones.
"""

import os
import random
import threading
from collections import Counter

import httpx
import rl_toys as toys
from test_rl_asynchronous import QueueService, config, in_log, loop, pool, trained_on  # noqa: F401  (pool is a fixture)

from rl_loop.learner.local_learner import LocalLearner
from rl_loop.run.checkpoint import checkpoints, restore_checkpoint

FAULTS, SEED = int(os.environ.get("FAULTS", "6")), int(os.environ.get("SEED", "17"))


class Killed(BaseException):
    """Like kill -9, nothing catches it."""


class Front:
    """The client of a service that dies and restarts. The service keeps its weights, as in a state folder."""

    def __init__(self, file, generator):
        self.file, self.random, self.lock = file, generator, threading.RLock()
        self.service = QueueService(file)
        self.restarts = 0

    def restart(self):
        with self.lock:
            old = self.service
            old.close()  # ends the thread; the groups that it was generating are lost
            self.service = QueueService(self.file)
            for kept in ("source", "versions", "owner", "checksum"):
                setattr(self.service, kept, getattr(old, kept))
            self.restarts += 1

    def __getattr__(self, name):
        def call(*arguments):
            with self.lock:
                service = self.service
            if service.stopping.is_set():
                raise httpx.ConnectError("the front is down")
            answer = getattr(service, name)(*arguments)
            if self.random.random() < 0.01:  # the service did the work, and died before it answered
                raise httpx.ReadError("the front died")
            return answer

        return call


def deadly(object_, name, generator, probability):
    """Sometimes kill the trainer before or after one of its effects."""
    effect = getattr(object_, name)

    def call(*arguments, **keywords):
        if generator.random() < probability:
            raise Killed
        result = effect(*arguments, **keywords)
        if generator.random() < probability:
            raise Killed
        return result

    setattr(object_, name, call)


def test_nothing_is_lost_and_nothing_trained_on_twice_through_random_deaths(tmp_path, pool, monkeypatch):  # noqa: F811
    generator = random.Random(SEED)
    monkeypatch.setattr("rl_loop.loops.retries.PAUSE", 0.01)
    monkeypatch.setattr("rl_loop.loops.pushing.PAUSE", 0.01)
    front = Front(tmp_path / "queue.sqlite", generator)
    steps = 3 * FAULTS
    settings = config(
        tmp_path / "run", steps=steps, prompts_per_step=2, completions=2, sampling={"max_tokens": 3}, max_staleness=2,
        checkpoint_every=2, lease_seconds=1.1, ready_timeout=20.0,
    )  # fmt: skip
    faults = Counter()
    running = loop(settings, front, pool)
    while True:
        begin = running.state.step
        armed = []
        take_step = running._step

        def step(take_step=take_step, armed=armed, running=running):
            if not armed:
                armed.append(True)
                for part, name in ((running.learner, "train"), (running.log, "step"), (running.reporter, "step")):
                    deadly(part, name, generator, 0.05)
            if generator.random() < 0.2:
                faults["front"] += 1
                front.restart()
            if generator.random() < 0.1:
                faults["lease"] += 1
                with front.service.lock:
                    front.service.queue.database.execute("UPDATE leases SET deadline = 0")
            take_step()

        running._step = step
        try:
            running.run()
            break
        except Killed:
            faults["trainer"] += 1
            assert running.state.step >= begin
            latest = checkpoints(settings.output)[-1]
            learner = LocalLearner(settings, toys.llama())
            running = loop(settings, front, pool, learner, restore_checkpoint(latest, learner))
    print(dict(faults), f"{front.restarts} restarts of the front")
    queue, groups = front.service.queue, {f"train-{i:09d}": 1 for i in range(2 * steps)}
    assert sum(faults.values()) >= FAULTS / 2
    assert trained_on(settings.output) == groups
    assert in_log(queue, "accepted") == groups
    acknowledged, cancelled = in_log(queue, "acknowledged"), in_log(queue, "cancelled")
    assert acknowledged + cancelled == groups, "in the end all, and each once"
    assert cancelled.total() < acknowledged.total() / 4
    assert front.service.versions == sorted(set(front.service.versions)), "versions only grow"
    assert [m.step for m in running.reporter.log.steps] == list(range(1, steps + 1))
    assert all(len(m.staleness) <= 3 for m in running.reporter.log.steps)
    status = queue.status()
    assert (status.waiting, status.finished, status.leased) == (0, 0, 0)
    front.service.close()
