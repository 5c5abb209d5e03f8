"""Group-relative advantages, against values worked out by hand."""

import pytest

from rl_loop.losses.advantages import group_advantages


def test_an_advantage_is_the_difference_from_the_groups_mean_in_standard_deviations():
    advantages = group_advantages([[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 2.0]])
    assert advantages.values[0] == pytest.approx([1.0, -1.0, -1.0, 1.0], abs=1e-5)
    # mean 2, population variance 2/3
    assert advantages.values[1] == pytest.approx([1.2247449, -1.2247449, 0.0], abs=1e-5)
    assert advantages.zero_variance_groups == 0


def test_without_normalisation_an_advantage_is_the_difference_from_the_mean():
    assert group_advantages([[1.0, 0.0, 0.0, 0.0]], normalise=False).values == [[0.75, -0.25, -0.25, -0.25]]


def test_groups_of_equal_rewards_are_counted_and_have_no_advantage():
    advantages = group_advantages([[0.1] * 3, [1.0, 0.0], [0.0, 0.0]])
    assert advantages.zero_variance_groups == 2
    assert advantages.values[0] == [0.0, 0.0, 0.0]
    assert advantages.values[2] == [0.0, 0.0]
