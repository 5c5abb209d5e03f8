"""Acceptance arithmetic, against values computed by hand and against simulation."""

import math
import random
from types import SimpleNamespace

import pytest

from drafters.acceptance import Acceptance, by_context_length, length_at, length_interval, total
from drafters.registry import DrafterConfig
from rollout_service.engine.loading import Versions
from rollout_service.engine.speculation_stats import SpeculationCounts
from rollout_service.http.acceptance_report import speculation_status


def test_ratios_are_those_of_a_hand_computed_example():
    acceptance = Acceptance(drafted=30, histogram=[4, 0, 0, 6])
    assert (acceptance.steps, acceptance.accepted) == (10, 18)
    assert acceptance.length == pytest.approx(2.8)
    assert acceptance.rate == pytest.approx(0.6)
    assert acceptance.accepted_by_position == [6, 6, 6]
    assert acceptance.by_position == pytest.approx([0.6, 0.6, 0.6])


def test_a_total_is_a_ratio_of_sums_and_not_a_mean_of_ratios():
    long, short = Acceptance(300, [0, 0, 0, 100]), Acceptance(3, [1, 0, 0, 0])
    assert total([long, short]).length == pytest.approx(1 + 300 / 101)
    assert total([long, short]).length != pytest.approx((long.length + short.length) / 2)


def test_nothing_drafted_has_length_one_and_no_interval():
    assert Acceptance().length == 1.0
    assert Acceptance(0, [0, 0]).by_position == []
    assert math.isnan(length_interval([Acceptance(3, [0, 1])])[0])


def test_the_interval_covers_the_true_length_in_95_of_100_cases():
    """Some completions are easier to draft than others, so the steps of one completion are correlated."""
    rng = random.Random(0)
    covered, naive = 0, 0
    for _ in range(400):
        parts = []
        for _ in range(60):
            chance = rng.choice([0.2, 0.8])
            steps = [int(rng.random() < chance) for _ in range(20)]
            parts.append(Acceptance(20, [steps.count(0), steps.count(1)]))
        low, high = length_interval(parts)
        covered += low <= 1.5 <= high
        # The interval of a wrong implementation, which treats all steps as independent.
        whole = total(parts)
        half = 1.96 * math.sqrt(whole.rate * (1 - whole.rate) / whole.steps)
        naive += abs(whole.length - 1.5) <= half
    assert 0.92 <= covered / 400 <= 0.98
    assert naive / 400 < 0.8


def test_the_context_of_a_step_includes_the_tokens_of_earlier_steps():
    # With a prompt of 5 tokens, steps begin after 6, 8 and 11 tokens; with one of 9 tokens, after 10.
    found = by_context_length([(5, [(0, 0), (3, 1), (3, 2), (3, 0), (0, 0)]), (9, [(0, 0), (3, 3)])])
    assert {floor: acceptance.histogram for floor, acceptance in found.items()} == {4: [0, 1], 8: [1, 0, 1, 1]}
    assert total(found.values()).accepted == 6


def test_the_report_sums_engines_and_keeps_versions_apart():
    def row(version, accepted):
        return {
            "policy_version": version, "drafter_version": 0, "draft_steps": 10, "drafted": 20,
            "accepted": sum(accepted), "accepted_by_position": accepted,
        }  # fmt: skip

    rows = [row(0, [8, 4]), row(0, [6, 2]), row(1, [1, 0])]
    contexts = [{8: [1, 2, 1], 16: [1, 0, 1]}, {16: [0, 0, 2]}]
    status = speculation_status(DrafterConfig(kind="mtp", draft_tokens=2), rows, {0: 0}, contexts, [], [], {})
    (mtp,) = status.drafters
    assert mtp.accepted_by_position == [15, 6]
    assert mtp.acceptance_length == pytest.approx(1 + 21 / 30)
    assert [(v.policy_version, v.accepted) for v in mtp.by_version] == [(0, 20), (1, 1)]
    assert mtp.by_version[0].acceptance_by_position == pytest.approx([0.7, 0.3])
    assert [(a.drafter_age, a.accepted) for a in mtp.by_age] == [(0, 20), (1, 1)]
    assert [(c.from_tokens, c.draft_steps, c.accepted) for c in mtp.by_context_length] == [(8, 4, 4), (16, 4, 6)]
    assert mtp.by_context_length[1].acceptance_length == pytest.approx(1 + 6 / 4)
    assert speculation_status(DrafterConfig(kind="none"), [], {0: 0}, [], [], [], {}).drafters == []


def test_the_answer_says_how_drafts_are_verified_and_not_what_was_configured():
    config = DrafterConfig(kind="mtp", verification="auto")
    runs = {"draft_sampling": "greedy", "verification": "block (vLLM)"}
    (mtp,) = speculation_status(config, [], {0: 0}, [], [], [], runs).drafters
    assert (mtp.draft_sampling, mtp.verification) == ("greedy", "block (vLLM)")
    (starting,) = speculation_status(config, [], {0: 0}, [], [], [], {}).drafters
    assert (starting.draft_sampling, starting.verification) == ("probabilistic", "auto")


def step(accepted):
    """vLLM's statistics of one scheduler step with a draft of two tokens."""
    at = [int(accepted > i) for i in range(2)]
    drafts = SimpleNamespace(
        num_drafts=1, num_draft_tokens=2, num_accepted_tokens=accepted, num_accepted_tokens_per_pos=at
    )
    return SimpleNamespace(spec_decoding_stats=drafts)


def test_counts_of_many_versions_are_bounded_and_their_totals_exact():
    held: list[Versions] = []
    counts = SpeculationCounts(lambda: held[-1])
    for version in range(1000):
        held.append(Versions(version, version // 10))
        counts.record(step(accepted=2), None)
        counts.record(step(accepted=0), None)
    rows = counts.rows()
    assert len(rows) == 65
    since = {drafter: 10 * drafter for drafter in range(97, 100)}
    status = speculation_status(DrafterConfig(kind="mtp", draft_tokens=2), [*rows, *rows], since, [], [], [], {})
    (mtp,) = status.drafters
    assert (mtp.draft_steps, mtp.drafted, mtp.accepted) == (4000, 8000, 4000)
    assert mtp.accepted_by_position == [2000, 2000]
    assert [v.policy_version for v in mtp.by_version] == list(range(936, 1000)), "the newest, separately"
    assert {v.draft_steps for v in mtp.by_version} == {4}
    assert [(a.drafter_age, a.draft_steps) for a in mtp.by_age] == [(age, 12) for age in range(10)]
    counts.forget()
    assert counts.rows() == []


def test_the_acceptance_length_at_a_draft_length_does_not_depend_on_the_lengths_that_were_drafted():
    generator = random.Random(0)

    def step(drafted):  # accepted with probability 0.9, then 0.8, then 0.7
        accepted = 0
        while accepted < drafted and generator.random() < (0.9, 0.8, 0.7)[accepted]:
            accepted += 1
        return drafted, accepted

    expected = 1 + 0.9 + 0.9 * 0.8 + 0.9 * 0.8 * 0.7
    assert length_at([step(3) for _ in range(20_000)], 3) == pytest.approx(expected, abs=0.02)
    assert length_at([step(generator.choice([0, 1, 3])) for _ in range(40_000)], 3) == pytest.approx(expected, abs=0.03)
    assert length_at([(1, 1), (1, 0)], 3) == 1 + 0.5 + 0.25 + 0.125
    assert length_at([(0, 0)], 3) is None
    assert length_at([], 3) is None
