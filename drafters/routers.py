"""Routers of a policy with experts: the modules whose logits transformers can return."""

import re
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def routers_of(policy: PreTrainedModel) -> dict[int, Any]:
    """The router of each layer that has one. Empty for a dense policy."""
    recorder: Any = policy.can_record_outputs.get("router_logits")
    if recorder is None:
        return {}
    found: list[tuple[str, nn.Module]] = [
        (name, module) for name, module in policy.named_modules() if isinstance(module, recorder.target_class)
    ]
    return {_layer(name): router for name, router in found}


def _layer(name: str) -> int:
    numbered = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    assert numbered is not None, name
    return int(numbered[1])
