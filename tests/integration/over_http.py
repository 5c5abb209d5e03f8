"""Requests to a service, and what their answers are compared with."""

import torch
from engines import MODELS
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from drafters.scoring import score_tokens
from rollout_service.protocol import GroupRequest, Sampling

PROMPT = "State the final answer to the following arithmetic problem: 12 + 34 - 56 =\n"


def requests(count=4, n=2, **sampling):
    return [GroupRequest(id=f"g{i}", prompt=PROMPT, n=n, sampling=Sampling(**sampling)) for i in range(count)]


def policy_tensors():
    tensors = load_file(MODELS / "policy" / "model.safetensors")
    return {name: tensor.float() for name, tensor in tensors.items()}


def mtp_tensors():
    return {name: tensor.float() for name, tensor in load_file(MODELS / "policy" / "mtp.safetensors").items()}


def worst_difference(groups, folder, change=None, **sampling):
    """Largest difference between returned and recomputed log-probabilities, in nats."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if change:
        change(model)
    worst = 0.0
    for group in groups:
        for completion in group.completions:
            tokens = torch.tensor(completion.token_ids)
            ids = torch.cat([torch.tensor(group.prompt_token_ids), tokens])[None]
            with torch.no_grad():
                logits = model(ids).logits[0, len(group.prompt_token_ids) - 1 : -1]
            expected = score_tokens(logits, tokens, **sampling).sampled_logprobs
            worst = max(worst, (expected - torch.tensor(completion.logprobs)).abs().max().item())
    return worst
