"""CostReport: the computed costs of a policy and its drafters, beside measured times, as JSON and as tables."""

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoConfig

from drafters.cost_report import CostReport, Step, cost_report, markdown, scaled, terminal
from drafters.policy_costs import policy_costs
from drafters.registry import DrafterConfig

MODELS = Path(__file__).parents[2] / "deploy" / "demo" / "models"
POLICY = MODELS / "policy"


def drafter(kind: str, k: int = 3) -> DrafterConfig:
    model = str(MODELS / kind) if kind in ("eagle3", "draft_model") else None
    return DrafterConfig(kind=kind, model=model, draft_tokens=k, schedule="fixed")


@pytest.fixture(scope="module")
def report() -> CostReport:
    kinds = ("none", "ngram", "draft_model", "eagle3", "mtp")
    steps = [Step(kind, drafter(kind), streams, 0.004) for kind in kinds for streams in (16, 64)]
    return cost_report(POLICY, steps, context=100.0, dtype="float32")


def test_the_policy_and_each_drafter_with_weights_stand_once(report):
    found = {model.model: (model.parameters, model.flops_per_token) for model in report.models}
    assert list(found) == ["policy", "draft_model", "eagle3", "mtp"]
    assert found["policy"] == (1_984_704, 3_902_208 + 3072 * 100)
    assert found["mtp"][0] == 394_816


def test_a_step_with_drafts_reads_the_policy_once_for_all_of_them(report):
    steps = {(step.drafter, step.streams): step for step in report.steps}
    costs = policy_costs(AutoConfig.from_pretrained(POLICY))
    weights = 4 * (costs.parameters - costs.embedding)
    cache = 4 * 100 * costs.cached
    for streams in (16, 64):
        assert steps["none", streams].policy_bytes == weights + streams * cache
        assert steps["mtp", streams].policy_bytes == steps["none", streams].policy_bytes, (
            "all of its experts are chosen"
        )
        assert steps["none", streams].drafter_bytes == steps["ngram", streams].drafter_bytes == 0
    assert steps["none", 16].draft_tokens == 0
    assert steps["mtp", 16].draft_tokens == 3
    # the head's own tensors, the policy's output head, and a cache of one layer of six, in each of three passes
    assert steps["mtp", 16].drafter_bytes == 3 * (4 * (394_816 + 160 * 192) + 16 * cache // 6)


def test_two_bytes_a_number_are_half_of_four(report):
    half = cost_report(POLICY, [Step("mtp", drafter("mtp"), 16)], context=100.0, dtype="bfloat16").steps[0]
    whole = next(step for step in report.steps if (step.drafter, step.streams) == ("mtp", 16))
    assert (2 * half.policy_bytes, 2 * half.drafter_bytes) == (whole.policy_bytes, whole.drafter_bytes)


def test_the_tables_have_what_the_json_has(report):
    assert CostReport.model_validate_json(report.model_dump_json()) == report
    text, shown = markdown(report), io.StringIO()
    Console(file=shown, width=120).print(*terminal(report))
    assert "for 100 tokens of context in float32" in text
    assert "| policy | 1,984,704 | 1,984,704 | 4.21 M |" in text
    assert "| none |  | 16 | 12.7 MB | 0 B | 4.00 |" in text
    for cell in ("1,984,704", "4.21 M", "12.7 MB", "ms a step, measured", "4.00"):
        assert cell in shown.getvalue()


def test_no_time_is_shown_that_was_not_measured():
    report = cost_report(POLICY, [Step("none", drafter("none"), 16)], context=100.0, dtype="float32")
    assert report.steps[0].seconds is None
    assert "ms a step" not in markdown(report)


def test_a_drafter_whose_checkpoint_is_not_known_is_said_to_be(report):
    step = Step("eagle3", DrafterConfig(kind="eagle3", schedule="fixed"), 16)
    found = cost_report(POLICY, [step], context=100.0, dtype="float32")
    assert [model.model for model in found.models] == ["policy"]
    assert found.steps[0].drafter_bytes is None
    assert found.steps[0].policy_bytes > 0
    assert "The costs of eagle3 are not known: drafter.model: kind 'eagle3' needs the folder" in markdown(found)
    assert "| eagle3 | 3 | 16 | 12.7 MB | not known |" in markdown(found)


def test_a_policy_without_formulas_costs_a_report_nothing_but_its_tables(tmp_path):
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path)
    found = cost_report(tmp_path, [Step("none", drafter("none"), 1)], context=1.0, dtype="float32")
    assert (found.models, found.steps) == ([], [])
    assert "The costs of policy are not known: no formulas for 'gpt2'" in markdown(found)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "of_next_year"}))
    assert "of_next_year" in cost_report(tmp_path, [], context=1.0, dtype=None).not_known["policy"]
    shutil.rmtree(tmp_path)
    assert "policy" in cost_report(tmp_path, [], context=1.0, dtype=None).not_known


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 "), (7, "7 "), (999, "999 "), (1000, "1.00 k"), (12_345, "12.3 k"), (999_600, "1.00 M"),
     (123_456_789, "123 M"), (16_400_000_000, "16.4 G"), (9.9e15, "9900 T")],
)  # fmt: skip
def test_three_digits_and_a_prefix(number, text):
    assert scaled(number) == text
