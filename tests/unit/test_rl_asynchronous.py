"""The asynchronous loop with toys: a real batch queue, a toy engine in a thread, and all else as in a run."""

import threading
import time
from collections import Counter

import httpx
import pytest
import rl_toys as toys
import torch
import toy_rewards
from rich.console import Console

from drafters.files.text_lines import json_lines
from rl_loop.learner.local_learner import LocalLearner
from rl_loop.loops.asynchronous import AsynchronousLoop
from rl_loop.loops.interruption import Interrupted
from rl_loop.loops.ownership import Ownership, new_run
from rl_loop.loops.pulling import EveryGroupFailed, Puller
from rl_loop.loops.sources import EndpointSource
from rl_loop.preflight import warn_of_memory_queue
from rl_loop.reports.metrics_log import MetricsLog
from rl_loop.reports.reporting import Reporter
from rl_loop.run.checkpoint import RunState, checkpoint_to_resume, checkpoints, restore_checkpoint
from rl_loop.run.ledger import Ledger
from rl_loop.tasks.rewards_pool import RewardsPool
from rl_loop.training import leave_checkpoint
from rollout_service.client import RolloutError, tensors_checksum
from rollout_service.protocol import ErrorBody, FailedGroup, WeightsStatus, WeightStatus
from rollout_service.queue.batch_queue import BatchQueue
from rollout_service.queue.finished_groups import UnknownLease


class QueueService:
    """The client's methods over a real queue and a toy engine that generates in a thread."""

    def __init__(self, file=None, delay=0.0, refuses=lambda index: False):
        """`refuses`: indices of the problems that the toy engine cannot generate."""
        self.queue = BatchQueue(file, capacity=1000, disk_mib=64)
        self.source = toys.SamplingSource(toys.llama())
        self.lock, self.delay, self.versions, self.refuses = threading.RLock(), delay, [], refuses
        self.owner, self.checksum = None, ""
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._generate, daemon=True)
        self.thread.start()

    def close(self):
        self.stopping.set()
        self.thread.join()

    def _generate(self):
        while not self.stopping.wait(0.002):
            with self.lock:
                self.queue.finished.expire_leases()
                waiting = self.queue.next_waiting()
            if waiting is not None:
                time.sleep(self.delay)
                with self.lock:
                    if self.refuses(waiting.request.metadata["index"]):
                        self.queue.fail(waiting.arrival, "ValueError: the prompt is too long")
                        continue
                    self.queue.finish(waiting.arrival, self.source._group(waiting.request), self.source.version)

    def weights(self):
        status = WeightStatus(version=self.source.version, tensors=1, bytes=1, checksum=self.checksum, run=self.owner)
        return WeightsStatus(policy=status, drafter=None, dtype="float32", shared_memory="/no/such")

    def push_weights(self, of, tensors, version, run=None, take_over=False):
        with self.lock:
            if self.owner not in (None, run) and not take_over:
                raise RolloutError(409, ErrorBody(error=f"belongs to the run {self.owner!r}, not to {run!r}"))
            if version <= self.source.version:
                raise RolloutError(409, ErrorBody(error=f"version {self.source.version} is in service"))
            self.owner, self.checksum = run, tensors_checksum(tensors)
            self.source.publish("policy", lambda dtype: tensors, version - 1)
            self.versions.append(version)
            self.queue.finished.drop_stale(version)
        return self.weights().policy

    def release_weights(self, run):
        with self.lock:
            self.owner = None if self.owner == run else self.owner

    def rollouts(self, requests):
        with self.lock:
            yield from [self.source._group(request) for request in requests]

    def lease(self, request):
        deadline = time.monotonic() + request.wait
        while True:
            with self.lock:
                version = max(self.source.version, request.version)
                if not self.queue.finished.should_wait(request, version) or time.monotonic() > deadline:
                    return self.queue.finished.lease(request, version)
            time.sleep(0.005)

    def _known(self, call, *arguments):
        try:
            with self.lock:
                return call(*arguments)
        except UnknownLease as error:
            raise RolloutError(404, ErrorBody(error=str(error))) from None

    def acknowledge(self, lease, groups):
        return self._known(self.queue.finished.acknowledge, lease, groups)

    def extend(self, lease, seconds):
        return self._known(self.queue.finished.extend, lease, seconds)

    def release(self, lease, groups):
        return self._known(self.queue.finished.release, lease, groups)

    def return_leases(self, run):
        with self.lock:
            return self.queue.finished.release_run(run)

    def cancel_prompts(self, run):
        with self.lock:
            self.queue.cancel(run)

    def send_prompts(self, request):
        with self.lock:
            return self.queue.add(request, request.groups)

    def batches(self):
        with self.lock:
            return self.queue.status()


@pytest.fixture
def service():
    service = QueueService()
    yield service
    service.close()


@pytest.fixture(scope="module")
def pool():
    with RewardsPool(toy_rewards.CountLetterA, processes=1, timeout=30.0) as pool:
        yield pool


def config(folder, **changes):
    return toys.config(folder, mode="async", **changes)


def loop(settings, service, pool, learner=None, state=None, drafter=None):
    reporter = Reporter(MetricsLog(settings.output, state.step if state else 0), settings.steps, Console(quiet=True))
    learner = learner or LocalLearner(settings, toys.llama())
    state = state or RunState(run=new_run(settings.output))
    ownership = Ownership(service, state.run, settings.take_over, state.pushed)
    task, tokenizer, source = toys.CountLetterA(), toys.character_tokenizer(), EndpointSource(ownership)
    return AsynchronousLoop(settings, task, learner, tokenizer, source, pool, reporter, state, drafter=drafter)


def trained_on(folder):
    return Counter(name for line in json_lines(folder / "groups.jsonl") for name in line["groups"])


def in_log(queue, event):
    return Counter(line["id"] for line in queue.log() if line["event"] == event)


def test_the_reward_goes_up_and_every_group_is_trained_on_once_within_the_bound(tmp_path, service, pool):
    settings = config(
        tmp_path, steps=12, prompts_per_step=8, completions=8, learning_rate=2e-2, max_staleness=2,
        evaluate_every=12, evaluation_prompts=8, evaluation_completions=8,
    )  # fmt: skip
    running = loop(settings, service, pool)
    running.run()
    log = running.reporter.log
    before, after = log.evaluations
    assert (before.step, after.step) == (0, 12)
    assert after.reward > before.reward + 0.2
    assert max(len(m.staleness) for m in log.steps) in (2, 3), "some tokens were stale, by at most 2 versions"
    assert trained_on(tmp_path) == {f"train-{i:09d}": 1 for i in range(96)}
    assert in_log(service.queue, "acknowledged") == {f"train-{i:09d}": 1 for i in range(96)}
    assert service.versions == sorted(service.versions)
    assert len(running.puller.due) <= 24, "only what is on its way is kept, not the whole run"
    assert [m.version for m in log.steps] == list(range(1, 13))
    status = service.queue.status()
    assert (status.waiting, status.finished, status.leased) == (0, 0, 0), "nothing is left for nobody"
    assert (status.dropped, status.tokens_wasted) == (0, 0), "no group is thrown away while nothing fails"
    for metrics in log.steps:
        assert metrics.exposed_generation <= metrics.seconds
        assert 0.0 < metrics.effective_sample_size <= 1.0


def test_with_max_staleness_0_no_token_is_stale(tmp_path, service, pool):
    running = loop(config(tmp_path, steps=4, max_staleness=0), service, pool)
    running.run()
    assert [len(m.staleness) for m in running.reporter.log.steps] == [1, 1, 1, 1]
    for metrics in running.reporter.log.steps:
        assert metrics.logprob_difference_max < 1e-4
        assert abs(metrics.z) < 4.0


def test_after_a_run_the_service_holds_the_policy_that_the_run_ended_with(tmp_path, service, pool):
    running = loop(config(tmp_path, steps=2), service, pool)
    running.run()
    assert service.versions[-1] == 3
    ended, served = running.learner.export(torch.float32), service.source.model.state_dict()
    assert all(torch.equal(ended[name], served[name]) for name in ended)


def test_a_dead_trainer_resumes_from_its_checkpoint_and_loses_or_repeats_nothing(tmp_path, pool):
    service = QueueService(tmp_path / "queue.sqlite")
    settings = config(tmp_path / "run", steps=8, checkpoint_every=3, keep_checkpoints=9)
    first = loop(settings, service, pool)
    take_step = first._step

    def step():
        if first.state.step == 5:
            raise Interrupted(9)
        take_step()

    first._step = step
    with pytest.raises(Interrupted):
        first.run()  # as after kill -9: no checkpoint has what was done after step 3
    assert sum(trained_on(settings.output).values()) == 15
    latest = checkpoints(settings.output)[-1]
    assert latest.name == "step-000003"
    learner = LocalLearner(settings, toys.llama())
    second = loop(settings, service, pool, learner, restore_checkpoint(latest, learner))
    second.run()
    assert trained_on(settings.output) == {f"train-{i:09d}": 1 for i in range(24)}
    assert in_log(service.queue, "acknowledged") == {f"train-{i:09d}": 1 for i in range(24)}
    assert service.versions == sorted(set(service.versions))
    assert [m.step for m in second.reporter.log.steps] == list(range(1, 9))
    service.close()


def test_a_run_that_dies_in_its_first_step_resumes_under_its_name(tmp_path, service, pool, monkeypatch):
    settings, names = config(tmp_path, steps=3, checkpoint_every=0), set()
    send = service.send_prompts

    def send_prompts(request):
        assert checkpoints(tmp_path), "the name is on disk before the service knows it"
        names.add(request.run)
        return send(request)

    monkeypatch.setattr(service, "send_prompts", send_prompts)
    first = loop(settings, service, pool)
    monkeypatch.setattr(first.learner, "train", lambda *_, **__: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        first.run()
    latest = checkpoint_to_resume(settings.model_copy(update={"resume": True}))
    learner = LocalLearner(settings, toys.llama())
    loop(settings, service, pool, learner, restore_checkpoint(latest, learner)).run()
    assert len(names) == 1
    assert trained_on(tmp_path) == {f"train-{i:09d}": 1 for i in range(9)}
    status = service.queue.status()
    assert (status.waiting, status.finished, status.leased) == (0, 0, 0), "nothing is left for nobody"


@pytest.mark.parametrize("where", ["learner.train", "_exported", "log.step", "reporter.step", "puller"])
def test_whatever_ends_an_asynchronous_run_leaves_a_checkpoint(where, tmp_path, service, pool, monkeypatch):
    running = loop(config(tmp_path, steps=6, checkpoint_every=0), service, pool)

    def failing(effect):
        def call(*arguments, **named):
            if running.state.step >= 3:
                raise AttributeError("nobody thought of it")
            return effect(*arguments, **named)

        return call

    if where == "puller":
        monkeypatch.setattr("rl_loop.loops.pulling.Puller._collect", failing(Puller._collect))
    else:
        *path, name = where.split(".")
        owner = getattr(running, path[0]) if path else running
        monkeypatch.setattr(owner, name, failing(getattr(owner, name)))
    with pytest.raises(AttributeError):
        running.run()
    learned = {name: t.clone() for name, t in running.learner.policy.state_dict().items()}
    leave_checkpoint(running, Console(quiet=True))
    latest = checkpoints(tmp_path)[-1]
    learner = LocalLearner(running.config, toys.llama())
    state = restore_checkpoint(latest, learner)
    assert state.step == running.state.step >= 3
    assert {values["step"].item() for values in learner.optimiser.state.values()} == {state.step}, (
        "the checkpoint holds these updates"
    )
    assert len(state.trained) == 3 * state.step, "the checkpoint has the policy and the groups that it was trained on"
    assert all(torch.equal(t, learned[name]) for name, t in learner.policy.state_dict().items())


def test_a_lease_that_ends_while_it_is_held_causes_no_second_training(tmp_path, service, pool):
    settings = config(tmp_path, steps=6, checkpoint_every=0, max_staleness=2)
    running = loop(settings, service, pool)
    take_step = running._step

    def step():
        with service.lock:
            service.queue.database.execute("UPDATE leases SET deadline = 0")
        time.sleep(0.05)
        take_step()

    running._step = step
    running.run()
    assert trained_on(tmp_path) == {f"train-{i:09d}": 1 for i in range(18)}
    assert in_log(service.queue, "returned").total() > 0
    ended = in_log(service.queue, "acknowledged") + in_log(service.queue, "cancelled")
    assert ended == trained_on(tmp_path), "each group left the queue once"


def test_dynamic_sampling_replaces_groups_that_teach_nothing(tmp_path, service):
    with RewardsPool(toy_rewards.HalfIndifferent, processes=1, timeout=30.0) as pool:
        settings = config(tmp_path, steps=3, loss={"kind": "dapo"}, sampling={"max_tokens": 20})
        running = loop(settings, service, pool)
        running.run()
    assert sum(m.groups_replaced for m in running.reporter.log.steps) > 0
    assert all(m.zero_variance_groups == 0 for m in running.reporter.log.steps)
    names = trained_on(tmp_path)
    assert sum(names.values()) == len(names) == 9


def test_a_reward_that_raises_costs_only_its_completion(tmp_path, service):
    with RewardsPool(toy_rewards.Failing, processes=1, timeout=30.0) as pool:
        running = loop(config(tmp_path, steps=3, completions=8), service, pool)
        running.run()
    assert sum(m.rewards_failed for m in running.reporter.log.steps) > 0
    assert running.state.step == 3


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_groups_that_the_service_could_not_generate_are_logged_replaced_and_never_trained_on(
    tmp_path, pool, caplog, max_staleness
):
    service = QueueService(refuses=lambda index: index % 4 == 1)
    running = loop(config(tmp_path, steps=5, max_staleness=max_staleness, checkpoint_every=2), service, pool)
    running.run()
    service.close()
    trained, failed = trained_on(tmp_path), in_log(service.queue, "failed")
    assert sum(trained.values()) == len(trained) == 15
    assert not trained & failed
    assert set(failed) >= {f"train-{i:09d}" for i in range(1, 19, 4)}
    assert "group train-000000001 failed and is left out: ValueError: the prompt is too long" in caplog.text
    assert sum(m.groups_failed for m in running.reporter.log.steps) >= 5
    acknowledged = in_log(service.queue, "acknowledged")
    assert max(acknowledged.values()) == 1
    assert set(trained) <= set(acknowledged)
    assert {"train-000000001", "train-000000005"} <= set(acknowledged)
    status = service.queue.status()
    assert (status.waiting, status.finished, status.failed, status.leased) == (0, 0, 0, 0)


def test_a_run_whose_groups_all_fail_ends_says_why_and_resumes_when_the_cause_is_fixed(tmp_path, pool):
    service = QueueService(refuses=lambda index: True)
    settings = config(tmp_path, steps=3)
    running = loop(settings, service, pool)
    with pytest.raises(EveryGroupFailed, match=r"the last \d\d groups failed.*: ValueError: the prompt is too long"):
        running.run()
    latest = running.save()
    service.refuses = lambda index: False
    learner = LocalLearner(settings, toys.llama())
    loop(settings, service, pool, learner, restore_checkpoint(latest, learner)).run()
    service.close()
    assert trained_on(tmp_path) == {f"train-{i:09d}": 1 for i in range(9)}


def test_failures_with_finished_groups_between_them_do_not_end_a_run(tmp_path, pool, monkeypatch):
    monkeypatch.setattr("rl_loop.loops.pulling.FAILED_IN_A_ROW", 3)
    service = QueueService(refuses=lambda index: index % 2 == 1)
    running = loop(config(tmp_path, steps=3), service, pool)
    running.run()
    service.close()
    assert running.state.step == 3


def test_failures_in_the_same_batch_as_a_finished_group_do_not_end_a_run(tmp_path, service, pool, monkeypatch):
    monkeypatch.setattr("rl_loop.loops.pulling.FAILED_IN_A_ROW", 3)
    running = loop(config(tmp_path), service, pool)
    puller = Puller(running.config, running.task, service, pool, "a", Ledger(0, [], []), int, int, 0)
    failed = [FailedGroup(id=f"train-{i:09d}", error="too long", metadata={}) for i in range(1, 5)]
    puller._leave_out(failed, beside_finished=True)
    assert (puller.failed, puller.failed_in_a_row) == (4, 0)
    with pytest.raises(EveryGroupFailed):
        puller._leave_out(failed, beside_finished=False)


def test_a_lasting_error_ends_the_run(tmp_path, service, pool):
    def refused(request):
        raise RolloutError(400, ErrorBody(error="no such prompt"))

    service.send_prompts = refused
    with pytest.raises(RolloutError, match="no such prompt"):
        loop(config(tmp_path), service, pool).run()


def test_a_heartbeat_that_dies_ends_the_run(tmp_path, service, pool):
    def broken(lease, seconds):
        raise KeyError("no answer that the client understands")

    service.extend, service.delay = broken, 0.05
    with pytest.raises(KeyError, match="no answer"):
        loop(config(tmp_path, steps=1000, lease_seconds=1.1), service, pool).run()


def test_a_run_is_warned_if_its_groups_would_die_with_the_service(service, tmp_path, capsys):
    warn_of_memory_queue(service, toys.config(tmp_path, mode="async"), Console())
    assert "--state" in capsys.readouterr().out
    warn_of_memory_queue(service, toys.config(tmp_path, mode="sync"), Console())
    assert capsys.readouterr().out == ""


def once(call, error):
    """`call`, but the first call raises `error`."""
    errors = [error]

    def called(*arguments):
        if errors:
            raise errors.pop()
        return call(*arguments)

    return called


@pytest.mark.parametrize("status", [502, 503])
def test_a_run_begins_and_ends_although_the_service_restarts(tmp_path, service, pool, monkeypatch, status):
    monkeypatch.setattr("rl_loop.loops.retries.PAUSE", 0.01)
    for name in ("weights", "cancel_prompts"):
        starting = RolloutError(status, ErrorBody(error="starting"))
        setattr(service, name, once(getattr(service, name), starting))
    running = loop(config(tmp_path, steps=1), service, pool)
    running.run()
    assert running.state.step == 1


@pytest.mark.parametrize("status", [503, None])
def test_prompts_are_sent_again_after_a_restart_since_the_queue_may_be_lost(tmp_path, monkeypatch, status):
    monkeypatch.setattr("rl_loop.loops.retries.PAUSE", 0.01)
    puller = Puller(config(tmp_path), None, None, None, "run", Ledger(0, [], []), int, int, 0)
    puller.resend = False
    error = httpx.ConnectError("down") if status is None else RolloutError(status, ErrorBody(error="starting"))
    assert puller._with_retries(once(lambda: "done", error)) == "done"
    assert puller.resend
