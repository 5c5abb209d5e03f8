"""The synchronous loop with toys: what it reports, what it publishes, and that the reward goes up."""

import math

import pytest
import rl_toys as toys
import torch

from drafters.files.text_lines import json_lines
from drafters.scoring import SurprisalSums
from rl_loop.learner.local_learner import LocalLearner
from rl_loop.loops.losslessness_alarm import NotLossless
from rl_loop.loops.prompts import sampling_seed
from rl_loop.loops.recording import Recorder, Recording, ReplayError, ReplaySource
from rl_loop.reports.metrics import STAGES
from rollout_service.protocol import MAX_COMPLETIONS


def run(settings, source=None, policy=None):
    loop = toys.loop(
        settings, LocalLearner(settings, policy or toys.llama()), source or toys.SamplingSource(toys.llama())
    )
    loop.run()
    return loop


def test_the_reward_goes_up(tmp_path):
    settings = toys.config(
        tmp_path,
        steps=12,
        prompts_per_step=8,
        completions=8,
        learning_rate=2e-2,
        evaluate_every=12,
        evaluation_prompts=8,
        evaluation_completions=8,
    )
    log = run(settings).reporter.log
    before, after = log.evaluations
    assert after.reward > before.reward + 0.2
    assert log.steps[-1].reward > log.steps[0].reward + 0.2


def test_a_step_is_reported_completely(tmp_path):
    settings = toys.config(tmp_path, steps=2, evaluate_every=1, tensorboard=True)
    log = run(settings).reporter.log
    lines = list(json_lines(tmp_path / "metrics.jsonl"))
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert list(line["stages"]) == list(STAGES) == ["data", "prepare", "generation", "logprob", "train"]
        assert all(seconds > 0.0 for seconds in line["stages"].values())
        assert sum(line["stages"].values()) <= line["seconds"]
        assert line["acceptance_length"] == pytest.approx(1 + 3 / 2)
        assert line["tokens"] == pytest.approx(line["response_length"] * 12)
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, float))
    assert [m.step for m in log.evaluations] == [0, 1, 2]


def test_trainer_and_rollout_agree_when_the_source_samples_what_was_published(tmp_path):
    stranger = toys.SamplingSource(toys.llama(seed=9))  # the source began with other weights
    settings = toys.config(tmp_path, steps=3, prompts_per_step=8, completions=8)
    loop = run(settings, stranger)
    for metrics in loop.reporter.log.steps:
        assert metrics.logprob_difference_max < 1e-4
        assert metrics.kl < 1e-8
        assert metrics.ratio == pytest.approx(1.0, abs=1e-5)
        assert abs(metrics.z) < 4.0
    assert abs(loop.state.losslessness.z) < 4.0
    assert loop.state.losslessness.tokens == sum(m.tokens for m in loop.reporter.log.steps)


class Hot(toys.SamplingSource):
    """A source that samples at another temperature than requested."""

    def rollouts(self, batch, requests):
        hot = [r.model_copy(update={"sampling": r.sampling.model_copy(update={"temperature": 3.0})}) for r in requests]
        yield from super().rollouts(batch, hot)


@pytest.mark.parametrize("alarm", ["warn", "stop"])
def test_an_alarm_is_raised_when_the_running_z_passes_its_limit(tmp_path, alarm):
    settings = toys.config(
        tmp_path, steps=3, prompts_per_step=16, completions=8, losslessness_limit=4.0, losslessness_alarm=alarm
    )
    policy = toys.llama()
    policy.lm_head.weight.data *= 8.0  # uncertain enough that the temperature shows
    loop = toys.loop(settings, LocalLearner(settings, policy), Hot(toys.llama()))
    alarms = []
    loop.reporter.alarm = alarms.append
    if alarm == "stop":
        with pytest.raises(NotLossless, match="running z"):
            loop.run()
    else:
        loop.run()
        assert len(alarms) == 3
        assert "running z" in alarms[0]
    assert abs(loop.state.losslessness.z) > 4.0


def test_no_alarm_is_raised_when_samples_follow_the_policy(tmp_path):
    settings = toys.config(
        tmp_path, steps=3, prompts_per_step=16, completions=8, losslessness_limit=4.0, losslessness_alarm="stop"
    )
    assert abs(run(settings).state.losslessness.z) < 4.0


def test_a_source_that_keeps_old_weights_is_detected(tmp_path):
    class Stale(toys.SamplingSource):
        def publish(self, of, export, version, **_):
            return version + 1

    settings = toys.config(tmp_path, steps=1, prompts_per_step=16, completions=8)
    metrics = run(settings, Stale(toys.llama(seed=9))).reporter.log.steps[0]
    assert metrics.logprob_difference_max > 0.1
    assert metrics.kl > 1e-2
    assert abs(metrics.z) > 4.0


def test_versions_grow_past_those_the_service_has(tmp_path):
    source = toys.SamplingSource(toys.llama(), version=7)
    loop = run(toys.config(tmp_path, steps=2, evaluate_every=1), source)
    assert [m.version for m in loop.reporter.log.steps] == [8, 9]
    assert [m.version for m in loop.reporter.log.evaluations] == [8, 9, 10], "the policy that is evaluated trains next"
    assert source.version == 10


@pytest.mark.parametrize("evaluate_every", [0, 1])
def test_after_a_run_the_service_holds_the_policy_that_the_run_ended_with(tmp_path, evaluate_every):
    source = toys.SamplingSource(toys.llama())
    loop = run(toys.config(tmp_path, steps=2, evaluate_every=evaluate_every), source)
    ended, served = loop.learner.export(torch.float32), source.model.state_dict()
    assert all(torch.equal(ended[name], served[name]) for name in ended)


def test_groups_of_equal_reward_leave_the_policy_alone(tmp_path):
    class Indifferent(toys.CountLetterA):
        def reward(self, problem, response):
            return 0.5

    settings = toys.config(tmp_path, steps=1)
    source = toys.SamplingSource(toys.llama())
    loop = toys.loop(settings, LocalLearner(settings, toys.llama()), source, task=Indifferent())
    loop.run()
    metrics = loop.reporter.log.steps[0]
    assert (metrics.zero_variance_groups, metrics.grad_norm, metrics.pass_rate) == (3, 0.0, 1.0)
    before, after = toys.llama().state_dict(), loop.learner.policy.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_reference_does_not_change_with_the_policy(tmp_path):
    settings = toys.config(tmp_path, steps=2, kl_coefficient=0.1)
    learner = LocalLearner(settings, toys.llama(), toys.llama())
    loop = toys.loop(settings, learner, toys.SamplingSource(toys.llama()))
    loop.run()
    first, second = loop.reporter.log.steps
    assert first.reference_kl == pytest.approx(0.0, abs=1e-8)
    assert second.reference_kl > 0.0


def test_seeds_are_repeatable_and_leave_room_for_a_groups_completions():
    seeds = {sampling_seed(0, batch, index) for batch in ("train-000001", "train-000002") for index in range(500)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**31 - MAX_COMPLETIONS for seed in seeds)
    assert sampling_seed(0, "train-000001", 3) == sampling_seed(0, "train-000001", 3)
    assert sampling_seed(1, "train-000001", 3) != sampling_seed(0, "train-000001", 3)


def test_recorded_rollouts_train_to_the_same_policy(tmp_path):
    live = toys.config(tmp_path / "live", evaluate_every=1)
    recording = tmp_path / "live" / "rollouts"
    source = Recorder(toys.SamplingSource(toys.llama()), Recording(recording))
    trained = run(live, source).learner.policy.state_dict()
    replayed = run(toys.config(tmp_path / "replayed", evaluate_every=1), ReplaySource(recording))
    assert all(torch.equal(t, trained[name]) for name, t in replayed.learner.policy.state_dict().items())
    assert replayed.state.losslessness != SurprisalSums()


@pytest.mark.parametrize(
    "changes", [{"steps": 3}, {"prompts_per_step": 4}, {"completions": 2}], ids=["step", "group", "completions"]
)
def test_a_recording_that_does_not_fit_is_refused(changes, tmp_path):
    live = toys.config(tmp_path / "live")
    run(live, Recorder(toys.SamplingSource(toys.llama()), Recording(tmp_path / "live" / "rollouts")))
    with pytest.raises(ReplayError, match="train-00000"):
        run(toys.config(tmp_path / "replayed", **changes), ReplaySource(tmp_path / "live" / "rollouts"))
