"""Sources: batches in which single groups fail, live and recorded; recordings and logs that hold any text."""

import json
import logging

import pytest
import rl_toys as toys
import torch
from test_rl_asynchronous import QueueService, config, loop, pool  # noqa: F401  (pool is a fixture)

from rl_loop.learner.local_learner import LocalLearner
from rl_loop.loops.recording import Recorder, Recording, ReplayError, ReplaySource
from rl_loop.reports.metrics_log import MetricsLog
from rl_loop.run.groups_log import GroupsLog
from rollout_service.client import RolloutError
from rollout_service.protocol import ErrorBody, GroupRequest

SEPARATORS = "\u2028\u2029\x85\r\n"


def failing(groups, fails):
    """Groups as the client yields them when some failed: the error comes after the other groups."""
    failed = []
    for group in groups:
        if fails(group.id):
            failed.append(ErrorBody(error="the engine refused it", group=group.id))
        else:
            yield group
    if failed:
        raise RolloutError(422, ErrorBody(error="some failed"), failed=failed)


class Failing(toys.SamplingSource):
    def __init__(self, fails):
        super().__init__(toys.llama())
        self.fails = fails

    def rollouts(self, batch, requests):
        yield from failing(super().rollouts(batch, requests), self.fails)


def run(settings, source):
    loop = toys.loop(settings, LocalLearner(settings, toys.llama()), source)
    loop.run()
    return loop


def is_second(name):
    return name.endswith("00001")


def test_a_step_and_an_evaluation_go_on_without_the_groups_that_failed_and_say_which(tmp_path, caplog):
    settings = toys.config(tmp_path, steps=2, evaluate_every=2)
    with caplog.at_level(logging.WARNING, "rl_loop"):
        loop = run(settings, Failing(is_second))
    assert loop.state.step == 2
    assert len(loop.reporter.log.evaluations) == 2
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 4
    assert any("train-000002-00001: the engine refused it" in line for line in said)


def test_a_step_whose_groups_all_failed_ends_the_run(tmp_path):
    with pytest.raises(RolloutError) as ended:
        run(toys.config(tmp_path, steps=1), Failing(lambda name: True))
    assert len(ended.value.failed) == 3


def test_a_stream_that_cannot_be_finished_ends_the_run(tmp_path):
    class Dying(toys.SamplingSource):
        def rollouts(self, batch, requests):
            yield self._group(requests[0])
            raise RolloutError(503, ErrorBody(error="engines died"))

    with pytest.raises(RolloutError, match="engines died"):
        run(toys.config(tmp_path, steps=1), Dying(toys.llama()))


def test_a_recorded_failure_is_a_failure_again(tmp_path):
    recording = tmp_path / "recording"
    live = run(toys.config(tmp_path / "live"), Recorder(Failing(is_second), Recording(recording)))
    replayed = run(toys.config(tmp_path / "replayed"), ReplaySource(recording))
    trained = live.learner.policy.state_dict()
    assert all(torch.equal(t, trained[name]) for name, t in replayed.learner.policy.state_dict().items())


def test_an_evaluation_of_the_asynchronous_loop_goes_on_without_the_groups_that_failed(tmp_path, pool):  # noqa: F811
    service = QueueService()
    all_groups = service.rollouts
    service.rollouts = lambda requests: failing(all_groups(requests), is_second)
    running = loop(config(tmp_path, steps=1, evaluate_every=1), service, pool)
    running.run()
    service.close()
    assert len(running.reporter.log.evaluations) == 2


def test_a_recording_holds_any_text(tmp_path):
    request = GroupRequest(id="a", prompt="1", metadata={"source": SEPARATORS})

    class Odd(toys.SamplingSource):
        def rollouts(self, batch, requests):
            for group in super().rollouts(batch, requests):
                group.completions[0].text = f"é{SEPARATORS}"
                yield group

    written = list(Recorder(Odd(toys.llama()), Recording(tmp_path)).rollouts("batch", [request]))
    assert list(ReplaySource(tmp_path).rollouts("batch", [request])) == written


@pytest.mark.parametrize("rest", [b'{"id": "a", "prompt_to\n', b"caf\xe9\n", b'{"id": "a"}\n'])
def test_a_recording_that_cannot_be_read_is_named(rest, tmp_path):
    (tmp_path / "batch.jsonl").write_bytes(rest)
    with pytest.raises(ReplayError, match=r"batch\.jsonl: "):
        list(ReplaySource(tmp_path).rollouts("batch", [GroupRequest(id="a", prompt="1")]))


def test_logs_continue_after_a_killed_run_left_half_a_line(tmp_path):
    run(toys.config(tmp_path, steps=2), toys.SamplingSource(toys.llama()))
    (tmp_path / "groups.jsonl").write_bytes(json.dumps({"step": 1, "groups": ["a"]}).encode() + b"\n")
    for name in ("metrics.jsonl", "groups.jsonl"):
        with (tmp_path / name).open("ab") as log:
            log.write('{"step": 1, "café'.encode()[:-1])
    assert [m.step for m in MetricsLog(tmp_path, 2).steps] == [1, 2]
    GroupsLog(tmp_path, 2)
    assert json.loads((tmp_path / "groups.jsonl").read_bytes()) == {"step": 1, "groups": ["a"]}
