"""Rewards that fail: they cost the same in both modes, and in every process."""

from contextlib import ExitStack, closing, contextmanager
from functools import partial

import pytest
import rl_toys as toys
from test_rl_asynchronous import QueueService, config, loop
from toy_rewards import FailingAt

from drafters.files.text_lines import json_lines
from rl_loop.learner.local_learner import LocalLearner
from rl_loop.tasks import TaskProblem
from rl_loop.tasks.rewards import LOST_IN_A_ROW, RewardsFailed, RewardsHere
from rl_loop.tasks.rewards_pool import RewardsPool

GROUPS, COMPLETIONS, MANY = 3, 4, 1000
GROUP = [(1, completion) for completion in range(COMPLETIONS)]
STEP = [(index, completion) for index in range(GROUPS) for completion in range(COMPLETIONS)]
ALL = [(index, completion) for index in range(MANY) for completion in range(COMPLETIONS)]
POSITIONS = {
    "the first": [(0, 0)],
    "one in the middle": [(1, 2)],
    "the last": [(2, 3)],
    "all but one of a group": GROUP[1:],
    "all of a group": GROUP,
    "all of the first group": [(0, completion) for completion in range(COMPLETIONS)],
    "all of a step": STEP,
}


@contextmanager
def loop_with(mode, processes, positions, folder, **changes):
    """Run a loop, by default of one step, whose rewards fail at `positions`."""
    task = partial(FailingAt, positions)
    changes = {"steps": 1, "prompts_per_step": GROUPS, "completions": COMPLETIONS} | changes
    with ExitStack() as stack:
        pool = stack.enter_context(RewardsPool(task, processes, timeout=30.0)) if processes else None
        if mode == "async":
            service = stack.enter_context(closing(QueueService()))
            service.source = toys.Positioned(toys.llama())
            yield loop(config(folder, **changes), service, pool)
        else:
            settings = toys.config(folder, **changes)
            source, learner = toys.Positioned(toys.llama()), LocalLearner(settings, toys.llama())
            yield toys.loop(settings, learner, source, task=task(), rewards=pool)


def run(*arguments, **changes):
    with loop_with(*arguments, **changes) as running:
        running.run()
    return running


@pytest.mark.parametrize(("mode", "processes"), [("sync", 0), ("async", 1)])
@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
def test_a_reward_that_fails_costs_its_completion_and_never_the_step(mode, processes, positions, tmp_path):
    running = run(mode, processes, positions, tmp_path)
    lost = {index for index in range(GROUPS) if COMPLETIONS - sum(i == index for i, _ in positions) < 2}
    replacements = len(lost) if mode == "async" else GROUPS if len(lost) == GROUPS else 0
    kept_groups = GROUPS - len(lost) + replacements
    kept = kept_groups * COMPLETIONS - sum(index not in lost for index, _ in positions)
    [metrics] = json_lines(tmp_path / "metrics.jsonl")
    assert metrics["rewards_failed"] == len(positions)
    assert metrics["tokens"] == pytest.approx(metrics["response_length"] * kept)
    assert metrics["zero_variance_groups"] == 0
    assert running.state.step == 1
    assert running.state.position >= GROUPS + replacements
    if mode == "async":
        [line] = json_lines(tmp_path / "groups.jsonl")
        assert len(line["groups"]) == kept_groups
        assert set(line["spent"]) == {f"train-{index:09d}" for index in lost}


@pytest.mark.parametrize(("mode", "processes"), [("sync", 0), ("sync", 1), ("async", 1)])
def test_a_run_whose_rewards_all_fail_ends_says_why_and_leaves_a_checkpoint(mode, processes, tmp_path):
    with loop_with(mode, processes, ALL, tmp_path) as running:
        with pytest.raises(
            RewardsFailed, match=r"the last \d+ groups had fewer.*LookupError: no reward for .*--resume"
        ):
            running.run()
        assert running.state.step == 0
        assert running.save().is_dir()
        assert running.state.position == 0 or mode == "async"


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_lost_groups_with_others_between_them_do_not_end_a_run(mode, tmp_path):
    positions = [(index, completion) for index, completion in ALL if index % 4 > 0]
    running = run(mode, 1, positions, tmp_path, steps=6, prompts_per_step=1)
    assert running.state.step == 6
    assert sum(m["rewards_failed"] for m in json_lines(tmp_path / "metrics.jsonl")) >= LOST_IN_A_ROW


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_an_evaluation_goes_on_without_failed_rewards_and_ends_the_run_when_there_are_no_others(mode, tmp_path):
    held_out = {"evaluate_every": 1, "evaluation_prompts": 2, "evaluation_completions": 2}
    some = [(0, 1)]
    running = run(mode, 1, some, tmp_path / "some", **held_out)
    assert [m.reward for m in running.reporter.log.evaluations] == [pytest.approx(1 / 3)] * 2
    with pytest.raises(RewardsFailed, match="no held-out response has a reward; the last failure: LookupError"):
        run(mode, 1, [(0, 0), (0, 1), (1, 0), (1, 1)], tmp_path / "none", **held_out)


@pytest.mark.parametrize("how", ["raise", "exit", "nan", "inf", "-inf"])
def test_a_reward_that_is_not_a_finite_number_fails_alone(how, caplog):
    rewards = RewardsHere(FailingAt([(0, 1)], how))
    values = [future.result() for future in rewards.submit(TaskProblem(entry={}), ["0.0", "0.1", "0.2"])]
    assert values == [0.0, None, 2.0]
    assert "a reward raised, so its completion is left out" in caplog.text
    with RewardsPool(partial(FailingAt, [(0, 1)], how), processes=1, timeout=30.0) as pool:
        assert [f.result() for f in pool.submit(TaskProblem(entry={}), ["0.0", "0.1", "0.2"])] == [0.0, None, 2.0]
        assert pool.last_failure
