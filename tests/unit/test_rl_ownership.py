"""Two trainers on one service: each trains only on its own policy's samples, or ends because another took over."""

import re
import time
from types import SimpleNamespace

import pytest
import rl_toys as toys
from test_rl_asynchronous import QueueService, config, in_log, loop, pool, trained_on  # noqa: F401  (pool is a fixture)

from rl_loop.learner.local_learner import LocalLearner
from rl_loop.loops.interruption import Interrupted
from rl_loop.loops.ownership import ForeignWeights, Ownership, new_run
from rl_loop.loops.pushing import Pusher
from rl_loop.loops.sources import EndpointSource
from rl_loop.run.checkpoint import checkpoints, read_state, restore_checkpoint
from rollout_service.client import RolloutError


@pytest.fixture
def service():
    service = QueueService()
    yield service
    service.close()


def push_another(service, run="other", take_over=True, version=None):
    """A second client pushes the policy times 0.8, by default as the next version."""
    with service.lock:
        weights = {name: tensor * 0.8 for name, tensor in service.source.model.state_dict().items()}
        service.push_weights("policy", weights, version or service.source.version + 1, run, take_over)


def before_step(running, number, act):
    """Call `act` when a loop begins the step of that number, counted from 0."""
    take_step = running._step

    def step():
        if running.state.step == number:
            act()
        take_step()

    running._step = step


def interrupted(running, step):
    """Run the asynchronous loop until a signal at that step. It leaves a checkpoint and releases its weights."""

    def signal():
        raise Interrupted(2)

    before_step(running, step, signal)
    with pytest.raises(Interrupted):
        running.run()
    running.save()
    running.ownership.release()


def resumed(settings, service, pool):  # noqa: F811
    latest = checkpoints(settings.output)[-1]
    learner = LocalLearner(settings, toys.llama())
    return loop(settings, service, pool, learner, restore_checkpoint(latest, learner))


# --- synchronous ---


def test_tokens_of_another_runs_policy_end_a_synchronous_run_with_both_versions_and_runs_named(tmp_path, service):
    settings = toys.config(tmp_path, steps=5)
    running = toys.loop(settings, LocalLearner(settings, toys.llama()), EndpointSource(Ownership(service, "mine")))
    sample, asked = service.rollouts, []

    def rollouts(requests):
        asked.append(requests)
        if len(asked) == 3:
            push_another(service)
        yield from sample(requests)

    service.rollouts = rollouts
    with pytest.raises(ForeignWeights) as ended:
        running.run()
    for named in ("version 4 ", "version 3.", "'mine'", "'other'", "--take_over"):
        assert named in str(ended.value)
    assert running.state.step == 2, "no token of another run was trained on"


def test_a_push_between_two_steps_is_refused_to_the_run_that_was_taken_over(tmp_path, service):
    settings = toys.config(tmp_path, steps=5)
    running = toys.loop(settings, LocalLearner(settings, toys.llama()), EndpointSource(Ownership(service, "mine")))
    before_step(running, 2, lambda: push_another(service))
    with pytest.raises(RolloutError, match="belongs to the run 'other', not to 'mine'"):
        running.run()
    assert running.state.step == 2


# --- asynchronous ---


def test_an_asynchronous_run_trains_on_no_token_of_another_runs_policy_while_its_own_push_is_slow(
    tmp_path, service, pool  # noqa: F811
):  # fmt: skip
    running = loop(config(tmp_path, steps=1000, max_staleness=2), service, pool)
    push = service.push_weights

    def slow_push(of, tensors, version, run=None, take_over=False):
        if version == 3 and run != "other":
            time.sleep(3)
        return push(of, tensors, version, run, take_over)

    service.push_weights = slow_push
    before_step(running, 2, lambda: push_another(service, version=7))
    with pytest.raises((ForeignWeights, RolloutError), match="'other'"):  # the push may be refused first
        running.run()
    assert running.state.step < 5


def test_an_asynchronous_run_whose_push_is_refused_ends(tmp_path, service, pool):  # noqa: F811
    running = loop(config(tmp_path, steps=1000), service, pool)
    before_step(running, 3, lambda: push_another(service))
    with pytest.raises((ForeignWeights, RolloutError), match="'other'"):
        running.run()
    assert running.state.step < 20


def service_versions(groups):
    return [s.version for g in groups for c in g.completions for s in c.weight_versions]


def test_tokens_of_a_version_whose_push_is_refused_do_not_count_as_the_runs_own(tmp_path, service, pool):  # noqa: F811
    """Another run took the version that this run was about to push, which only the answer to the push shows."""
    running = loop(config(tmp_path, steps=1000), service, pool)
    push = service.push_weights

    def slow_push(of, tensors, version, run=None, take_over=False):
        if version == 3 and run != "other":
            push_another(service)  # as version 3
            time.sleep(0.5)  # meanwhile its tokens arrive
        return push(of, tensors, version, run, take_over)

    service.push_weights = slow_push
    checked = []
    check = running.check_versions
    running.check_versions = lambda groups: check(groups) or checked.extend(service_versions(groups))
    with pytest.raises((ForeignWeights, RolloutError), match="'other'"):
        running.run()
    assert 3 in running.ownership.pushed
    assert 3 not in checked


def test_groups_that_another_run_sampled_meanwhile_are_generated_again_for_a_resumed_run(tmp_path, service, pool):  # noqa: F811
    settings = config(tmp_path, steps=6, max_staleness=2)
    service.delay = 0.02
    interrupted(loop(settings, service, pool), 3)
    push_another(service, take_over=False)
    foreign = service.source.version
    service.release_weights("other")
    deadline = time.monotonic() + 10
    while service.queue.status().waiting and time.monotonic() < deadline:  # the other run's policy samples them
        time.sleep(0.01)
    second = resumed(settings, service, pool)
    trained = []
    check = second.check_versions
    second.check_versions = lambda groups: check(groups) or trained.extend(service_versions(groups))
    second.run()
    assert foreign not in trained
    assert min(service.versions[service.versions.index(foreign) + 1 :]) == foreign + 3
    assert trained_on(tmp_path) == {f"train-{i:09d}": 1 for i in range(18)}


def test_groups_that_the_run_itself_sampled_are_used_after_a_resume(tmp_path, service, pool, monkeypatch):  # noqa: F811
    """Where the signal comes before the policy of its step is in service. Else the next version is one higher, and
    groups that were just fresh enough are generated again."""
    settings, offer = config(tmp_path, steps=6, max_staleness=2), Pusher.offer
    first = loop(settings, service, pool)
    with monkeypatch.context() as signalled:
        signalled.setattr(Pusher, "offer", lambda pusher, *what: offer(pusher, *what) if first.state.step < 3 else None)
        interrupted(first, 3)
    assert max(service.versions) <= first._version(2)
    pushed = len(service.versions)
    second = resumed(settings, service, pool)
    second.run()
    assert service.versions[pushed] == first._version(3), "no version was skipped"
    assert second.ownership.run == first.ownership.run
    assert in_log(service.queue, "dropped").total() == 0


def test_a_killed_run_resumes_on_the_service_that_it_still_owns(tmp_path, service, pool):  # noqa: F811
    settings = config(tmp_path, steps=8, checkpoint_every=3, max_staleness=2)
    first = loop(settings, service, pool)

    def killed():
        raise Interrupted(9)

    before_step(first, 5, killed)
    with pytest.raises(Interrupted):
        first.run()
    assert service.owner == first.ownership.run
    assert read_state(checkpoints(tmp_path)[-1]).step == 3
    second = resumed(settings, service, pool)
    second.run()
    assert second.state.step == 8


# --- what a run owns ---


def test_a_run_takes_over_only_once_and_not_from_a_later_owner(service):
    push_another(service, "earlier")
    mine = Ownership(service, "mine", take_over=True)
    weights = toys.llama().state_dict()
    mine.push("policy", weights, 2)
    assert service.owner == "mine"
    push_another(service, "later")
    with pytest.raises(RolloutError, match="'later'"):
        mine.push("policy", weights, 4)


def test_a_checkpoint_holds_the_pushed_versions_within_the_bound():
    ownership = Ownership(SimpleNamespace(), "a", pushed=[3, 4, 7, 8, 9])
    assert ownership.recent(max_staleness=2) == [7, 8, 9]
    assert ownership.recent(max_staleness=0) == [9]


def test_a_runs_name_has_its_folder_and_is_unique(tmp_path):
    first, second = new_run(tmp_path / "train"), new_run(tmp_path / "train")
    assert first != second
    assert re.fullmatch(r"train-\w{12}", first)
    assert re.fullmatch(r"a_b_-\w{12}", new_run(tmp_path / "a b\udcff"))
    assert len(new_run(tmp_path / ("x" * 200))) < 256
