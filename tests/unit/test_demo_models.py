"""The models in deploy/demo/models are what their cards say, and small enough to be kept in git."""

import re
from pathlib import Path

import pytest
from transformers import AutoConfig

import drafters.latent_moe  # noqa: F401  (which transformers then knows)
from drafters.policy_costs import policy_costs

MODELS = Path(__file__).parents[2] / "deploy" / "demo" / "models"


@pytest.mark.parametrize("folder", [MODELS, MODELS / "latent"], ids=["qwen3_next", "latent_moe"])
def test_a_card_has_the_sizes_of_its_files_and_the_parameters_of_its_policy(folder):
    card = (folder / "README.md").read_text(encoding="utf-8")
    sizes = {
        name: int(size.replace(",", "")) for name, size in re.findall(r"\| (\S+\.safetensors) \|.*\| ([\d,]+) \|", card)
    }
    assert sizes == {str(p.relative_to(folder)): p.stat().st_size for p in folder.glob("*/*.safetensors")}
    costs = policy_costs(AutoConfig.from_pretrained(folder / "policy"))
    said = float(re.search(r"([\d.]+) million parameters", card)[1])
    assert said == pytest.approx(costs.parameters / 1e6, abs=0.02)
    if costs.active_parameters != costs.parameters:
        assert f"passes {costs.active_parameters / 1e6:.2f} million" in " ".join(card.split())


def test_the_latent_moe_policy_with_its_drafters_takes_12_mb_at_most():
    assert sum(path.stat().st_size for path in (MODELS / "latent").rglob("*") if path.is_file()) <= 12e6
