"""Rows of the comparison: ratios of sums, speed relative to the same round's baseline, and their keys."""

import asyncio
import contextlib
import json
from itertools import chain
from pathlib import Path

import pytest
from matplotlib.axes import Axes

from drafters.registry import DrafterConfig
from rollout_service.config import ServiceConfig
from rollout_service.evaluation import compare as comparing
from rollout_service.evaluation.arms import EngineArm, engine_name
from rollout_service.evaluation.compare_config import CompareConfig
from rollout_service.evaluation.prompts import read_prompts
from rollout_service.evaluation.report import costs_of, drafters_of, label, markdown, plot_acceptance, plot_speed, style
from rollout_service.evaluation.rows import Cell, steps_of
from rollout_service.evaluation.short_names import short_names
from rollout_service.protocol import Completion, Group, Sampling, Speculation

POLICY = Path(__file__).parents[2] / "deploy" / "demo" / "models" / "policy"
KEYS = {
    "drafter", "model", "draft_tokens", "concurrency", "acceptance_length", "acceptance_length_ci", "acceptance_rate",
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
    assert row.context == 1 + 100 / 2
    assert "| mtp |  | 3 | probabilistic | auto | 4 |" in markdown([row])


@pytest.mark.parametrize(
    ("tokens", "histogram", "steps"),
    [
        (48, None, 48),
        (1 + 4 * 9 + 1, [1, 0, 0, 9], 1 + 10),
        (1 + 4 * 9 + 1 - 3, [1, 0, 0, 9], 1 + 10),  # the response ends inside of its last step
        (1 + 20 + 4 * 2, [0, 0, 0, 2], 1 + 20 + 2),  # n-grams were found in two steps only
    ],
)
def test_a_step_takes_the_time_in_which_all_streams_take_one(tokens, histogram, steps):
    cell = Cell(DrafterConfig(kind="mtp"), concurrency=4)
    for _ in range(2):
        cell.add_round([group(tokens, histogram)] * 8, seconds=3.0)
    assert steps_of(group(tokens, histogram).completions[0]) == steps
    assert cell.step_seconds == pytest.approx(3.0 / (steps * 2)), "8 responses in 4 streams: two after the other"


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


def test_an_engine_on_a_gpu_serves_one_way_of_drawing_its_drafts_and_every_verification(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    both = {"draft_sampling": ["probabilistic", "greedy"], "verification": ["standard", "block"]}
    config = CompareConfig(
        model="m", prompts=tmp_path / "prompts.jsonl", drafters=[{"kind": "mtp"} | both, {"kind": "ngram"} | both]
    )
    arms = config.arms("v2")
    assert [(a.kind, a.draft_sampling) for a in arms[1:3]] == [("mtp", "probabilistic"), ("mtp", "greedy")]
    assert [a.kind for a in arms] == ["none", "mtp", "mtp", "ngram"]

    def ways(runner):
        return [
            [(way.draft_sampling, way.verification) for way in config.ways(arm, runner)] for arm in config.arms(runner)
        ]

    assert ways("v2")[1:] == [
        [("probabilistic", "standard"), ("probabilistic", "block")],
        [("greedy", "standard")],
        [("greedy", "standard")],
    ]
    assert list(chain(*ways("v2"))) == list(chain(*ways("v1"))), "the rows are the same"


async def test_rows_say_what_ran_and_not_what_was_asked(monkeypatch):
    class Fleet:
        runner = "v2"
        asked = None

        def __init__(self, *_, **__):
            pass

        async def set_draft_sampling(self, sampling):
            pass

        async def set_verification(self, verification):
            self.asked = verification

        async def running(self):
            return {"draft_sampling": "greedy", "verification": "standard (vLLM)"}

    monkeypatch.setattr("rollout_service.evaluation.arms.Fleet", Fleet)
    drafter = DrafterConfig(kind="mtp", verification="block")
    arm = EngineArm(ServiceConfig(model="m", drafter=drafter))
    cell = Cell(drafter, 4, ran=await arm.draft_as(drafter))
    cell.add_round([group(100, [1, 0, 0, 9])], 1.0)
    row = cell.row(None, z=0.0)
    assert arm.fleet.asked == "block"
    assert (row.draft_sampling, row.verification) == ("greedy", "standard (vLLM)")
    assert engine_name(arm) == "mtp, probabilistic drafts"
    Fleet.runner = "v1"
    assert engine_name(arm) == "mtp"


def two_heads():
    """Rows of two heads of one kind, whose folders have the same name."""
    rows = []
    for model in ("runs/first/head", "runs/second/head"):
        cell = Cell(DrafterConfig(kind="eagle3", model=model), 1)
        cell.add_round([group(100, [1, 0, 0, 9])], 1.0)
        rows.append(cell.row(cell, z=0.0))
    return rows


def test_two_heads_of_one_kind_have_different_names_in_rows_and_tables():
    rows = two_heads()
    assert [row.model for row in rows] == ["runs/first/head", "runs/second/head"]
    table = markdown(rows)
    assert "| drafter | model | k |" in table
    assert "| eagle3 | first/head | 3 |" in table
    assert "| eagle3 | second/head | 3 |" in table


def test_two_heads_of_one_kind_have_different_names_in_plots(tmp_path, monkeypatch):
    rows, drawn = two_heads(), []
    drafters, names = drafters_of(rows), short_names(row.model for row in rows)
    assert [label(row, drafters, names) for row in rows] == ["eagle3 first/head, k=3", "eagle3 second/head, k=3"]
    assert len({style(row, drafters)["color"] for row in rows}) == 2
    assert label(rows[0], drafters[:1], names) == "eagle3, k=3", "a single head needs no longer name"
    plot = Axes.plot

    def noted(axes, *points, label, **more):
        drawn.append(label)
        return plot(axes, *points, label=label, **more)

    monkeypatch.setattr(Axes, "plot", noted)
    (tmp_path / "prompts.jsonl").touch()
    config = CompareConfig(model="m", prompts=tmp_path / "prompts.jsonl", concurrency=[1], output=tmp_path)
    plot_acceptance(rows, config)
    plot_speed(rows, config)
    assert drawn == ["eagle3 first/head, k=3", "eagle3 second/head, k=3"] * 2


@pytest.mark.parametrize(("z", "code"), [(-4.1, 1), (3.9, None)])
def test_a_comparison_with_a_row_that_is_not_lossless_is_written_and_exits_with_1(z, code, tmp_path, monkeypatch):
    cell = Cell(DrafterConfig(), 4, "float32")
    cell.add_round([group(100, None)], 2.0)
    row = cell.row(None, z)
    monkeypatch.setattr(comparing, "measure", lambda config, console: asyncio.sleep(0))
    monkeypatch.setattr(comparing, "judge", lambda *_: [row])
    prompts = POLICY.parents[1] / "prompts.jsonl"
    config = CompareConfig(model=str(POLICY), prompts=prompts, drafters=[], output=tmp_path / "compare")
    ended = pytest.raises(SystemExit) if code else contextlib.nullcontext()
    with ended as exited:
        comparing.compare(config)
    assert json.loads((config.output / "compare.json").read_text())[0]["z"] == z
    assert not code or exited.value.code == code
    costs = json.loads((config.output / "costs.json").read_text())
    assert costs["models"][0]["active_parameters"] == 1_984_704
    (step,) = costs["steps"]
    assert (step["streams"], step["seconds"]) == (4, row.step_seconds)
    assert "| none |  | 4 | 8.44 MB | 0 B | 80.00 |" in (config.output / "compare.md").read_text()


def test_ways_to_verify_drafts_are_one_step_and_drafters_and_draft_lengths_are_others(tmp_path):
    rows = []
    for k, verification, seconds in ((3, "standard", 1.0), (3, "block", 3.0), (1, "standard", 1.0)):
        cell = Cell(DrafterConfig(kind="mtp", draft_tokens=k, verification=verification), 4, "float32")
        cell.add_round([group(11, [5, 5])], seconds)
        rows.append(cell.row(None, z=0.0))
    config = CompareConfig(model=str(POLICY), prompts=POLICY.parents[1] / "prompts.jsonl", output=tmp_path)
    costs = costs_of(rows, config)
    found = [(step.drafter, step.draft_tokens, step.streams, step.seconds) for step in costs.steps]
    assert found == [("mtp", 3, 4, pytest.approx(2.0 * 4 / 11)), ("mtp", 1, 4, pytest.approx(1.0 * 4 / 11))]
    assert costs.dtype == "float32"


def test_a_short_name_is_the_shortest_unique_end_of_a_path():
    models = ["runs/a/head", "/runs/b/head", "org/eagle3", "", "head"]
    assert list(short_names(models).values()) == ["a/head", "b/head", "org/eagle3", "", "head"]
    assert short_names(["runs/a/head", "org/eagle3"]) == {"runs/a/head": "head", "org/eagle3": "eagle3"}


def test_prompts_may_be_messages_of_a_chat_as_the_service_takes_them(tmp_path):
    file = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "1 + 1 ="}]
    file.write_text(
        json.dumps({"messages": messages}) + "\n" + json.dumps({"prompt": "1 + 1 ="}) + "\n", encoding="utf-8"
    )
    of_chat, plain = read_prompts(str(POLICY), file)
    assert len(of_chat) > 0
    assert plain != of_chat, "the policy's chat template was applied"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"prompt": [{"role": "user", "content": "a"}]}, "name a list of messages `messages`"),
        ({"messages": [{"rule": "user"}]}, "role"),
        ({"messages": "a"}, "valid list"),
        ({"prompt_token_ids": ["a"]}, "has no prompt"),
        ({"text": "a"}, "has no prompt"),
        ({"prompt": ""}, "has no prompt"),
    ],
)
def test_lines_that_are_not_prompts_are_refused_with_their_number(line, said, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n' + json.dumps(line) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"^prompts: .*line 2: (.|\n)*{said}"):
        read_prompts(str(POLICY), file)
