"""Draft model: a small language model that drafts on its own and reads no hidden states of the policy."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from drafters.drafter import Drafter
from drafters.files.model_folder import resolve_model
from drafters.policy_costs import DraftCosts, cost_facts, policy_costs
from drafters.settings import Section


class DraftModelShape(Section):
    hidden_size: int = Field(default=0, ge=0, multiple_of=32)
    """draft_model: hidden size of the model; 0 for half the policy's"""
    layers: int = Field(default=2, ge=1)
    """draft_model: number of layers"""


class DraftModelDrafter(Drafter):
    kind = "draft_model"
    has_folder = True
    shape = DraftModelShape

    def speculative_config(self) -> dict[str, Any] | None:
        return self._sampled("draft_model", model=self._model())

    def check(self, policy_config: dict[str, Any], own_config: dict[str, Any] | None, tensors: Collection[str]) -> None:
        assert own_config is not None
        own, policy = own_config.get("vocab_size"), policy_config.get("vocab_size")
        if own != policy:
            raise ValueError(
                f"drafter.model: the draft model has {own} tokens and the policy {policy}. The policy gives no "
                "probability to tokens of another vocabulary: use a draft model with the policy's tokenizer"
            )

    def owns(self, name: str) -> bool:
        return True

    def checkpoint(self, policy: Path) -> Path | None:
        return Path(self._model())

    def costs(self, policy: Any) -> DraftCosts:
        from transformers import AutoConfig

        import drafters.latent_moe  # noqa: F401

        own = policy_costs(AutoConfig.from_pretrained(resolve_model(self._model(), "drafter.model")))
        return DraftCosts(own, own)

    @classmethod
    def recognised(cls, config: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any] | None:
        # any language model can be a draft model
        return {"kind": "draft_model, or a policy without a head"} | cost_facts(config)
