"""Routers with a tie that a test has made: at one position of one layer, two experts are as near as it asks for."""

import copy

import torch
from transformers import PreTrainedModel


@torch.no_grad()
def with_margin(
    model: PreTrainedModel, tokens: list[int], margin: float, pair: tuple[int, int] | None = None, layer: int = 0
) -> tuple[PreTrainedModel, tuple[int, int]]:
    """A copy of the model whose router has this margin at the last of `tokens`, and the two experts there: the logit of
    the first minus that of the second. `pair`: these experts, if not the last chosen one and the next."""
    model = copy.deepcopy(model)
    router, seen = model.model.layers[layer].mlp.gate, []
    with router.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0][-1].double())):
        model(input_ids=torch.tensor([tokens]))
    logits_E = router.weight.double() @ seen[0]
    pair = pair or tuple(logits_E.topk(router.top_k + 1).indices[-2:].tolist())
    change = logits_E[pair[0]] - logits_E[pair[1]] - margin
    router.weight[pair[1]] += (change * seen[0] / seen[0].square().sum()).float()
    return model, pair
