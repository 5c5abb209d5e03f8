"""Off-policy corrections and reward shaping, against values worked out by hand."""

import math
from types import SimpleNamespace

import pytest
import rl_toys as toys
import torch
import toy_rewards
from pydantic import TypeAdapter, ValidationError

from rl_loop.batching import Rollout
from rl_loop.config import TrainConfig
from rl_loop.learner.local_learner import LocalLearner
from rl_loop.loops.step import shaped_rewards
from rl_loop.losses.correction_config import AnyCorrection
from rl_loop.losses.corrections import correct
from rl_loop.losses.shaping import overlong_penalty
from rl_loop.reports.metrics import GradedGroup

# Ratios of the trained to the sampling policy, by token; the last two tokens are of version 5, which is trained.
RATIOS = [4.0, 0.25, 1.5, 3.0, 1.0]
VERSIONS = [3, 4, 4, 5, 5]


def configured(**fields):
    return TypeAdapter(AnyCorrection).validate_python(fields)


def weights(version=5, ratios=RATIOS, versions=VERSIONS, **fields):
    rollout = Rollout([1], list(range(len(ratios))), [-1.0] * len(ratios), versions)
    proximal = torch.tensor([-1.0 + math.log(ratio) for ratio in ratios])
    correction = correct(configured(**fields), [rollout], [proximal], version)
    return correction.weights and correction.weights[0].tolist(), correction.metrics


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"kind": "decoupled"}, [4.0, 0.25, 1.5, 1.0, 1.0]),
        ({"kind": "truncated"}, [2.0, 0.25, 1.5, 1.0, 1.0]),
        ({"kind": "truncated", "high": 1.2}, [1.2, 0.25, 1.2, 1.0, 1.0]),
        ({"kind": "truncated", "tokens": "all"}, [2.0, 0.25, 1.5, 2.0, 1.0]),
        ({"kind": "icepop"}, [4.0, 0.0, 1.5, 1.0, 1.0]),
        ({"kind": "icepop", "high": 3.5}, [0.0, 0.0, 1.5, 1.0, 1.0]),
        ({"kind": "icepop", "proximal": "sampling"}, [1.0, 0.0, 1.0, 1.0, 1.0]),
        # Geometric mean of the off-policy tokens: (4 x 0.25 x 1.5)^(1/3) = 1.145
        ({"kind": "sequence_mask"}, [0.0] * 5),
        ({"kind": "sequence_mask", "high": 1.2}, [4.0, 0.25, 1.5, 1.0, 1.0]),
        ({"kind": "none"}, None),
    ],
)
def test_weights_follow_their_definition(fields, expected):
    found, _ = weights(**fields)
    assert found == (None if expected is None else pytest.approx(expected, rel=1e-5))


def test_tokens_of_the_trained_version_are_left_alone():
    found, metrics = weights(kind="truncated", versions=[5] * 5)
    assert found is None
    assert metrics.staleness == [5]


def test_ratio_effective_sample_size_and_staleness_are_over_all_tokens():
    _, metrics = weights(kind="icepop")
    assert metrics.staleness == [2, 2, 1]
    assert metrics.importance_ratio == pytest.approx(9.75 / 5, rel=1e-5)
    squares = 16 + 0.0625 + 2.25 + 9 + 1
    assert metrics.effective_sample_size == pytest.approx(9.75**2 / (5 * squares), rel=1e-5)
    assert metrics.masked == pytest.approx(1 / 5)


def test_a_sampling_proximal_policy_leaves_no_ratio_to_truncate():
    with pytest.raises(ValidationError, match="proximal"):
        configured(kind="truncated", proximal="sampling")
    with pytest.raises(ValidationError, match="low"):
        configured(kind="icepop", low=6.0)


@pytest.mark.parametrize(("length", "penalty"), [(1, 0.0), (80, 0.0), (90, -0.5), (100, -1.0)])
def test_overlong_responses_lose_reward_linearly(length, penalty):
    assert overlong_penalty(length, max_tokens=100, buffer=20) == pytest.approx(penalty)
    assert overlong_penalty(length, max_tokens=100, buffer=0) == 0.0


def test_a_loss_has_its_own_defaults_and_given_settings_override_them():
    plain = TrainConfig(model="m").loss
    assert (plain.kind, plain.clip_low, plain.clip_high, plain.average) == ("grpo", 0.2, 0.2, "token")
    dapo = TrainConfig(model="m", loss={"kind": "dapo", "clip_low": 0.1}).loss
    assert (dapo.clip_low, dapo.clip_high, dapo.dynamic_sampling) == (0.1, 0.28, True)
    assert (plain.overlong_share, dapo.overlong_share) == (0.0, 0.2)
    assert TrainConfig(model="m", loss={"kind": "dr_grpo"}).loss.normalise_advantages is False
    assert TrainConfig(model="m", loss={"kind": "gspo"}).loss.average == "sequence"


def test_dapo_punishes_over_the_last_fifth_of_max_tokens():
    completions = [SimpleNamespace(token_ids=[0] * length) for length in (20, 80, 90, 100)]
    graded = GradedGroup(SimpleNamespace(completions=completions), [1.0, 1.0, 1.0, 1.0])
    for kind, rewards in (("dapo", [1.0, 1.0, 0.5, 0.0]), ("grpo", [1.0] * 4)):
        config = TrainConfig(model="m", loss={"kind": kind}, sampling={"max_tokens": 100})
        assert shaped_rewards(config, graded) == pytest.approx(rewards)


def test_dynamic_sampling_fills_a_step_with_groups_whose_rewards_differ(tmp_path):
    settings = toys.config(tmp_path, loss={"kind": "dapo"}, steps=2, sampling={"max_tokens": 20})
    source = toys.SamplingSource(toys.llama())
    loop = toys.loop(settings, LocalLearner(settings, toys.llama()), source, task=toy_rewards.HalfIndifferent())
    loop.run()
    for metrics in loop.reporter.log.steps:
        assert metrics.zero_variance_groups == 0
        assert metrics.groups_replaced > 0
        assert metrics.tokens == pytest.approx(metrics.response_length * 12), "three groups of four, as configured"
    assert loop.state.position > 6, "the prompts of replaced groups are used up"


def test_dynamic_sampling_ends_even_if_all_rewards_are_equal(tmp_path):
    class Indifferent(toys.CountLetterA):
        def reward(self, problem, response):
            return 0.5

    settings = toys.config(tmp_path, loss={"kind": "dapo"}, steps=1, dynamic_sampling_rounds=3)
    source = toys.SamplingSource(toys.llama())
    loop = toys.loop(settings, LocalLearner(settings, toys.llama()), source, task=Indifferent())
    loop.run()
    assert (loop.state.step, loop.state.position) == (1, 9)
