"""The pusher: the newest policy reaches the service, even if single pushes fail."""

import threading
from types import SimpleNamespace

import httpx
import pytest
import torch

import rl_loop.loops.pushing
from rl_loop.loops.ownership import Ownership
from rl_loop.loops.pushing import Pusher
from rollout_service.client import RolloutError, tensors_checksum
from rollout_service.protocol import ErrorBody

TENSORS = {"b.weight": torch.arange(6.0).reshape(2, 3), "a.weight": torch.ones(2)}


class Service:
    """Each push does the next thing in `script`. After the last, pushes succeed."""

    def __init__(self, *script):
        self.script, self.pushed = list(script), []
        self.status = SimpleNamespace(version=0, checksum="", run=None)
        self.first_began, self.go = threading.Event(), threading.Event()

    def push_weights(self, of, tensors, version, run, take_over):
        self.first_began.set()
        self.go.wait(10)
        if self.script and (error := self.script.pop(0)) is not None:
            raise error
        self.pushed.append(version)
        self.status.version = version
        return SimpleNamespace(pause=0.25)

    def weights(self):
        return SimpleNamespace(policy=self.status)


def refused(status):
    return RolloutError(status, ErrorBody(error="no"))


@pytest.fixture
def push(monkeypatch):
    monkeypatch.setattr(rl_loop.loops.pushing, "PAUSE", 0.01)
    pushers = []

    def started(service, timeout=5.0):
        pushers.append(Pusher(Ownership(service, "a"), timeout))
        pushers[-1].start()
        return pushers[-1]

    yield started
    for pusher in pushers:
        pusher.stop()
        pusher.join(5)
        assert not pusher.is_alive()


def test_only_the_newest_of_the_versions_offered_during_a_push_is_pushed(push):
    service = Service()
    pusher = push(service)
    pusher.offer(1, TENSORS)
    service.first_began.wait(5)
    for version in (2, 3, 4):
        pusher.offer(version, TENSORS)
    service.go.set()
    pusher.wait_for(4)
    assert service.pushed == [1, 4]
    assert pusher.pauses == [0.25, 0.25]


def test_a_push_that_fails_for_a_while_is_tried_again(push):
    service = Service(httpx.ConnectError("down"), refused(503), refused(507))
    service.go.set()
    pusher = push(service)
    pusher.offer(1, TENSORS)
    pusher.wait_for(1)
    assert (pusher.published, pusher.failure) == (1, None)


def test_a_refusal_is_final(push):
    service = Service(refused(400))
    service.go.set()
    pusher = push(service)
    pusher.offer(1, TENSORS)
    pusher.wait_for(1)
    assert pusher.failure.status == 400


@pytest.mark.parametrize(("run", "checksum", "ours"), [("a", None, True), ("a", "another", False), ("b", None, False)])
def test_a_version_already_in_service_counts_as_pushed_if_its_run_and_bytes_are_ours(push, run, checksum, ours):
    service = Service(refused(409))
    service.status = SimpleNamespace(version=1, checksum=checksum or tensors_checksum(TENSORS), run=run)
    service.go.set()
    pusher = push(service)
    pusher.offer(1, TENSORS)
    pusher.wait_for(1)
    assert (pusher.published, pusher.failure is None) == ((1, True) if ours else (0, False))


def test_a_service_that_lost_its_weights_gets_the_newest_again(push):
    service = Service()
    service.go.set()
    pusher = push(service)
    pusher.offer(1, TENSORS)
    pusher.wait_for(1)
    service.status.version = 0
    pusher.restore()
    pusher.wait_for(1)
    assert service.pushed == [1, 1]


def test_a_push_that_ends_during_the_check_is_not_considered_lost(push):
    service = Service()
    service.go.set()
    pusher = push(service)
    pusher.offer(1, TENSORS)
    pusher.wait_for(1)
    answer = SimpleNamespace(policy=SimpleNamespace(version=1, checksum="", run=None))

    def answered_late():
        pusher.offer(2, TENSORS)
        pusher.wait_for(2)
        return answer

    service.weights = answered_late
    pusher.restore()
    assert (pusher.published, service.pushed) == (2, [1, 2])
