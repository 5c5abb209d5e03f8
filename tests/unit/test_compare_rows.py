"""Rows of the comparison: ratios of sums, speed relative to the same round's baseline, and the agreed keys."""

import json

import pytest

from drafters.drafter import DrafterConfig
from rollout_service.evaluation.config import CompareConfig
from rollout_service.evaluation.report import markdown
from rollout_service.evaluation.rows import Cell
from rollout_service.protocol import Completion, Group, Sampling, Speculation

KEYS = {
    "drafter", "draft_tokens", "concurrency", "acceptance_length", "acceptance_length_ci", "acceptance_rate",
    "acceptance_by_position", "tokens_per_second", "speedup", "z", "tokens",
}  # fmt: skip


def group(tokens, histogram):
    speculation = histogram and Speculation(
        drafter="mtp", drafter_version=0, draft_steps=sum(histogram), drafted=3 * sum(histogram),
        accepted=sum(j * n for j, n in enumerate(histogram)), accepted_histogram=histogram,
    )  # fmt: skip
    completion = Completion(
        index=0, text="", token_ids=[0] * tokens, logprobs=[0.0] * tokens, weight_versions=[], finish_reason="length",
        speculation=speculation,
    )  # fmt: skip
    return Group(id="g", prompt_token_ids=[1], completions=[completion], sampling=Sampling(), engine=0)


def test_speed_is_relative_to_the_same_round_so_that_a_slow_moment_cancels():
    none = Cell(DrafterConfig(), 4)
    mtp = Cell(DrafterConfig(kind="mtp"), 4)
    for slow in (1.0, 10.0, 1.0):
        none.add_round([group(100, None)], 2.0 * slow)
        mtp.add_round([group(100, [1, 0, 0, 9])], 1.0 * slow)
    row = mtp.row(none, z=0.5)
    assert row.speedup == pytest.approx(2.0)
    assert row.acceptance_length == pytest.approx(1 + 27 / 10)
    assert row.acceptance_rate == pytest.approx(0.9)
    assert row.tokens == 300
    assert none.row(none, z=0.0).speedup == pytest.approx(1.0)
    assert mtp.row(None, z=0.0).speedup is None
    assert set(json.loads(row.model_dump_json())) >= KEYS
    assert "| mtp | 3 | probabilistic | auto | 4 |" in markdown([row])


def test_the_rate_interval_is_the_length_interval_per_draft():
    cell = Cell(DrafterConfig(kind="mtp"), 1)
    cell.add_round([group(10, [4, 0, 0, 6]), group(10, [2, 0, 0, 8]), group(10, [0, 5, 0, 5])], 1.0)
    row = cell.row(None, z=0.0)
    low, high = row.acceptance_rate_ci
    assert low < row.acceptance_rate < high
    assert high - low == pytest.approx((row.acceptance_length_ci[1] - row.acceptance_length_ci[0]) / 3)


def test_one_engine_serves_all_ways_of_drawing_its_drafts(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    config = CompareConfig(
        model="m", prompts=tmp_path / "prompts.jsonl", draft_tokens=[1, 3],
        drafters=[{"kind": "ngram"}, {"kind": "mtp", "draft_sampling": ["probabilistic", "greedy"]}],
    )  # fmt: skip
    arms = config.arms()
    assert [(a.kind, a.draft_tokens) for a in arms[1:]] == [("ngram", 1), ("ngram", 3), ("mtp", 1), ("mtp", 3)]
    assert arms[0].kind == "none"
    assert [way.draft_sampling for way in config.ways(arms[-1])] == ["probabilistic", "greedy"]
    assert [way.draft_sampling for way in config.ways(arms[1])] == ["greedy"]
