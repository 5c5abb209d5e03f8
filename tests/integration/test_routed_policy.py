"""The audit of an engine whose policy's routers leave experts out: ties are counted, and explain what they may."""

import json

import pytest
import torch
from test_lossless import KINDS, POLICY, Auditor, engine
from tied_routers import with_margin
from tiny_models import NEXT
from transformers import AutoTokenizer, Qwen3NextConfig, Qwen3NextForCausalLM

from rollout_service.evaluation.cut import Cut

TIED = [5, 17, 3]
"""the prompt after which two experts tie"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A random policy with 4 of 16 experts a layer that has a tie; the same with the other expert there, first by as
    little and then by more; and prompts."""
    torch.manual_seed(0)
    base = Qwen3NextForCausalLM(Qwen3NextConfig(**NEXT | {"num_experts": 16, "num_experts_per_tok": 4})).float().eval()
    for parameter in base.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.15)
    policy, pair = with_margin(base, TIED, 5e-6)
    made = {"policy": policy, "tied": with_margin(policy, TIED, -5e-6, pair)[0]}
    made["other"] = with_margin(policy, TIED, -1e-3, pair)[0]
    folder = tmp_path_factory.mktemp("routed")
    for name, model in made.items():
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(POLICY).save_pretrained(folder / name)
    lines = [TIED, [9], [4, 4], [7, 100, 6]]
    (folder / "prompts").write_text("".join(f"{json.dumps({'prompt_token_ids': ids})}\n" for ids in lines))
    return folder


def rows(folders, served, cuts, drafter="none"):
    auditor = Auditor(4_000, folders / "policy", prompts=folders / "prompts", contexts=5)
    with engine(drafter, folders / served) as llm:
        return [auditor.row(llm, KINDS[drafter], cut) for cut in cuts]


def test_the_engine_may_choose_the_other_expert_at_a_tie(folders):
    for row in rows(folders, "tied", [Cut(), Cut(0.7, 0.9)]):
        assert row.failures == []
        assert row.router_ties.flips >= 1
        assert 100 < row.router_ties.excused <= row.router_ties.tokens_in_reach


def test_the_engine_may_not_choose_the_other_expert_elsewhere(folders):
    (row,) = rows(folders, "other", [Cut()])
    assert "log-probabilities" in row.failures


def test_an_engine_that_drafts_passes(folders):
    for row in rows(folders, "policy", [Cut(), Cut(0.0)], "ngram"):
        assert row.failures == []
        assert row.router_ties.positions > 1000
        assert row.router_ties.near > 10
