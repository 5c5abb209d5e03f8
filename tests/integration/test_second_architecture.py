"""The audit passes an engine of an architecture that the demo does not have."""

import pytest
from test_lossless import POLICY, Auditor, engine
from tiny_models import save_drafter, save_policy

from rollout_service.evaluation.cut import Cut


@pytest.mark.parametrize("kind", [pytest.param("draft_model", marks=pytest.mark.again), "eagle3"])
def test_a_second_architecture_passes(kind, tmp_path):
    """A random Qwen3 with a random drafter, so that almost no draft is accepted, and every token is uncertain."""
    policy = save_policy("qwen3", seed=0, folder=tmp_path / "policy", tokenizer=POLICY)
    drafter = save_drafter(kind, policy, seed=1, folder=tmp_path / "drafter")
    auditor = Auditor(5_000, tmp_path / "policy")
    with engine("none", tmp_path / "policy") as llm:
        greedy = auditor.greedy_of(llm)
    with engine(drafter, tmp_path / "policy") as llm:
        for method, cut in (("standard", Cut(1.0, 0.9)), ("block", Cut(0.7, 1.0, 20)), ("block", Cut(0.0))):
            row = auditor.row(llm, drafter.model_copy(update={"verification": method}), cut, greedy=greedy)
            assert row.failures == []
