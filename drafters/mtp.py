"""Multi-token prediction: a layer inside the policy's own checkpoint, sharing its embedding and output head."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from drafters.drafter import Drafter


def is_mtp(name: str) -> bool:
    """Whether a tensor of the policy's checkpoint belongs to its MTP layers (Qwen3-Next and MiMo names)."""
    return name.startswith(("mtp.", "model.mtp_layers."))


class MTPDrafter(Drafter):
    kind = "mtp"

    def speculative_config(self) -> dict[str, Any] | None:
        return self._sampled("mtp")

    def owns(self, name: str) -> bool:
        return is_mtp(name)

    def checkpoint(self, policy: Path) -> Path | None:
        return policy

    def check(self, policy_config: dict[str, Any], own_config: dict[str, Any] | None, tensors: Collection[str]) -> None:
        if not (policy_config.get("num_nextn_predict_layers") or policy_config.get("mtp_num_hidden_layers")):
            raise ValueError(
                f"drafter.kind: 'mtp' needs a policy with an MTP layer in its checkpoint, and "
                f"{policy_config.get('architectures')} declares none (num_nextn_predict_layers)"
            )
        if not any(map(is_mtp, tensors)):
            raise ValueError(
                "drafter.kind: 'mtp' needs the head's tensors (mtp.*) in the policy's checkpoint: its config.json "
                "declares an MTP layer, and its files hold none. Serve a folder that has the head, or train one with "
                "`drafters train --kind mtp`"
            )
