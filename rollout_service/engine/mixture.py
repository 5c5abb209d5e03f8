"""Mixtures of experts: what `engine.routed_experts` needs of a policy."""

from typing import Any

EXPERTS = "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"
"""names under which configurations of transformers have the number of experts, as vLLM looks for them"""


def check_mixture(policy_config: dict[str, Any]) -> None:
    """Raises ValueError unless the policy's config.json is that of a mixture of experts."""
    text = policy_config | policy_config.get("text_config", {})
    if not any(text.get(name) for name in EXPERTS):
        raise ValueError(
            f"engine.routed_experts: a policy of the type {text.get('model_type')!r} without experts has no routers; "
            "leave it out"
        )
