"""The demo recipe's training of a policy with experts: its load-balancing loss, and what it records."""

import json
import math
import sys
from pathlib import Path

import pytest
import reasoning_gym
import torch

sys.path.append(str(Path(__file__).parents[2] / "deploy" / "demo" / "recipe"))

import policy as recipe
from tokenizer import make_tokenizer
from transformers import Qwen3NextConfig
from working import solution

from drafters.expert_routing import RouterReading

EXPERTS, STEPS = 4, 16


@pytest.fixture(scope="module")
def problems():
    return reasoning_gym.create_dataset(
        "chain_sum", seed=7, size=8 * STEPS, min_terms=3, max_terms=3, min_digits=2, max_digits=2
    )


@pytest.fixture
def train(problems, tmp_path, monkeypatch):
    """Trains a tiny policy whose tokens choose one expert each, and returns it with the records of its steps."""
    texts = [p["question"] + "\n" + solution(p["metadata"]["expression"]) for p in (problems[i] for i in range(20))]
    tokenizer = make_tokenizer(texts, tmp_path / "tokenizer")
    small = Qwen3NextConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, layer_types=["full_attention"] * 2, num_experts=EXPERTS, num_experts_per_tok=1,
        moe_intermediate_size=16, shared_expert_intermediate_size=16, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    monkeypatch.setattr(recipe, "policy_config", lambda family, tokenizer: small)
    monkeypatch.setattr(recipe, "sample", lambda *_: [])
    monkeypatch.setattr(recipe, "right_and_length", lambda *_: (0.0, 0.0))

    class Validation(list):
        def __getitem__(self, i):
            return None

    def run(**changes):
        records = tmp_path / f"records{len(list(tmp_path.iterdir()))}"
        trained = recipe.train_policy(
            "qwen3_next",
            problems,
            Validation(),
            tokenizer,
            steps=STEPS,
            slips=0.1,
            batch_size=8,
            records=records,
            **changes,
        )
        return trained, [json.loads(line) for line in (records / "steps.jsonl").read_text().splitlines()], records

    return run


def imbalance(line):
    return max(EXPERTS * load for loads in line["expert_load"] for load in loads)


def test_each_step_is_recorded_with_loads_that_add_up_and_a_plot(train, capsys):
    _, lines, records = train()
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["loss"] < lines[0]["loss"]
    for line in lines:
        assert [sum(loads) for loads in line["expert_load"]] == pytest.approx([1.0, 1.0], abs=1e-5)
        assert all(0.0 < entropy <= math.log(EXPERTS) for entropy in line["router_entropy"])
    assert (records / "router.png").read_bytes().startswith(b"\x89PNG")
    assert "nats, load-balancing loss" in capsys.readouterr().out


def test_the_coefficient_balances_experts(train):
    _, without, _ = train(lr=2e-2)
    _, balanced, _ = train(lr=2e-2, router_coefficient=1.0)
    assert balanced[0] == without[0], "both begin alike"
    assert imbalance(without[-1]) > 2.2
    assert imbalance(balanced[-1]) < 1.7


def test_without_the_coefficient_the_loss_changes_no_weight(train, monkeypatch):
    plain, _, _ = train()
    monkeypatch.setattr(RouterReading, "loss", lambda *_, **__: torch.zeros(()))
    other, _, _ = train()
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), other.parameters(), strict=True))
