"""The audit passes engines of architectures that the demo does not have."""

import pytest
from test_lossless import POLICY, Auditor, engine
from tiny_models import save_drafter, save_policy

from rollout_service.evaluation.cut import Cut


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        pytest.param("qwen3", "draft_model", marks=pytest.mark.again),
        ("qwen3", "eagle3"),
        pytest.param("nemotron_h", "mtp", marks=pytest.mark.again),
    ],
)
def test_another_architecture_passes(architecture, kind, tmp_path):
    """A random policy with a random drafter, so that almost no draft is accepted, and every token is uncertain."""
    policy = save_policy(architecture, seed=0, folder=tmp_path / "policy", tokenizer=POLICY)
    drafter = save_drafter(kind, policy, seed=1, folder=tmp_path / "drafter")
    auditor = Auditor(5_000, tmp_path / "policy")
    with engine("none", tmp_path / "policy") as llm:
        greedy = auditor.greedy_of(llm)
    with engine(drafter, tmp_path / "policy") as llm:
        for method, cut in (("standard", Cut(1.0, 0.9)), ("block", Cut(0.7, 1.0, 20)), ("block", Cut(0.0))):
            row = auditor.row(llm, drafter.model_copy(update={"verification": method}), cut, greedy=greedy)
            assert row.failures == []
