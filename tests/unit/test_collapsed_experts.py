"""The alarm on experts that a router has almost stopped choosing."""

import pytest
import rl_toys as toys
from test_expert_routing import OfMixture, collapsed

from rl_loop.learner.local_learner import LocalLearner
from rl_loop.loops.collapsed_experts import LEAST, STEPS, CollapsedExperts, check_experts
from rl_loop.reports.metrics import StepMetrics

EXPERTS = 4
ENOUGH = LEAST * 100 * EXPERTS  # tokens, at the limit of 1 % of an equal share


def step(number, loads, tokens=ENOUGH):
    return StepMetrics.model_construct(step=number, tokens=tokens, expert_load=loads)


def alarms(tmp_path, steps, **changes):
    raised = []
    check_experts(toys.config(tmp_path, **changes), steps, raised.append)
    return raised


EVEN, COLLAPSED = [0.25] * 4, [0.3, 0.001, 0.499, 0.2]


def test_an_expert_below_its_limit_is_named(tmp_path):
    (message,) = alarms(tmp_path, [step(7, [EVEN, COLLAPSED])])
    assert "after step 7, 1 of 8 experts" in message
    assert "layer 1 expert 1 (0.40%)" in message
    assert "expert_limit = 0.01 " in message


def test_an_uneven_load_above_the_limit_is_no_collapse(tmp_path):
    assert alarms(tmp_path, [step(1, [[0.7, 0.003, 0.15, 0.147]])]) == []
    assert alarms(tmp_path, [step(1, [EVEN, COLLAPSED])], expert_limit=0.003) == []
    assert alarms(tmp_path, [step(1, [EVEN, COLLAPSED])], expert_limit=0.0) == []


def test_shares_are_taken_over_the_tokens_of_the_latest_steps(tmp_path):
    one_bad = [step(i, [EVEN]) for i in range(1, STEPS)] + [step(STEPS, [COLLAPSED])]
    assert alarms(tmp_path, one_bad) == [], "one step of unusual prompts"
    collapsing = one_bad + [step(i, [COLLAPSED]) for i in range(STEPS + 1, 2 * STEPS)]
    assert alarms(tmp_path, collapsing[:-1]) == [], "one of the last ten steps was even"
    assert len(alarms(tmp_path, collapsing)) == 1
    many = [step(1, [EVEN], tokens=ENOUGH), step(2, [[0.5, 0.0, 0.25, 0.25]], tokens=1000 * ENOUGH)]
    assert len(alarms(tmp_path, many)) == 1, "a step counts by its tokens"


def test_nothing_is_judged_by_too_few_tokens(tmp_path):
    empty = [[0.5, 0.0, 0.25, 0.25]]
    assert alarms(tmp_path, [step(1, empty, tokens=ENOUGH - 1)]) == []
    assert len(alarms(tmp_path, [step(1, empty, tokens=ENOUGH // 2), step(2, empty, tokens=ENOUGH // 2)])) == 1


def test_many_collapsed_experts_are_counted_and_only_the_lowest_are_named(tmp_path):
    loads = [[1.0 - 15e-5, *([1e-5] * 14), 0.0]]
    (message,) = alarms(tmp_path, [step(1, loads, tokens=4 * ENOUGH)])
    assert "15 of 16 experts" in message
    assert message.index("expert 15 (0.00%)") < message.index("expert 1 (")
    assert message.count("layer 0 expert") == 5


@pytest.mark.parametrize("alarm", ["warn", "stop"])
def test_a_run_whose_router_has_collapsed_raises_the_alarm(tmp_path, alarm):
    policy = collapsed()
    settings = toys.config(
        tmp_path, steps=3, prompts_per_step=16, completions=8, learning_rate=1e-9, expert_alarm=alarm
    )
    loop = toys.loop(settings, LocalLearner(settings, policy), OfMixture(policy))
    raised = []
    loop.reporter.alarm = raised.append
    if alarm == "stop":
        with pytest.raises(CollapsedExperts, match="layer 0 expert 2"):
            loop.run()
        assert loop.state.step == 2
    else:
        loop.run()
        assert raised
        assert all("layer 0 expert 2" in message and "layer 0 expert 3" in message for message in raised)
        assert "after step 2, 4 of 8 experts" in raised[0], "the first step has too few tokens"


def test_an_alarm_that_is_off_takes_no_way_to_raise_it(tmp_path):
    with pytest.raises(ValueError, match="expert_alarm: has no effect with expert_limit = 0"):
        toys.config(tmp_path, expert_limit=0.0, expert_alarm="stop")
