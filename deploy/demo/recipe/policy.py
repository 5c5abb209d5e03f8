"""Supervised training of a demo policy on worked solutions of a fallible teacher.

The policy learns the teacher's errors too, so that reinforcement learning can unlearn them.

Both policies have full attention in every layer, so that vLLM serves them on a CPU with each kind of drafter:

- qwen3_next: a small Qwen3-Next. Both experts of a layer process every token, so no result depends on a near tie in the
  router.
- latent_moe: the same, with 16 experts in a latent space, 5 of them active. A token passes as many weights, 147,456 in
  the routed experts and projections of a layer. Here near ties matter.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from sampling import right_and_length, sample
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from working import solution

import drafters.latent_moe  # noqa: F401  (which transformers then knows)
from drafters.expert_routing import Routing, find_routers, reading_routers
from rl_loop.reports.metrics import router_metrics
from rl_loop.reports.router_plot import plot_routers

LAYERS = 6
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_next": {"architectures": ["Qwen3NextForCausalLM"], "num_experts": 2, "num_experts_per_tok": 2},
    "latent_moe": {
        "architectures": ["LatentMoEForCausalLM"],
        "num_experts": 16,
        "num_experts_per_tok": 5,
        "moe_latent_size": 64,
    },
}
"""what differs between the demo's policies, by `model_type`"""


def policy_config(family: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    return AutoConfig.for_model(
        family,
        **FAMILIES[family],
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        layer_types=["full_attention"] * LAYERS,
        mlp_only_layers=[],
        partial_rotary_factor=1.0,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=128,
        tie_word_embeddings=False,
        router_aux_loss_coef=0.0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        num_nextn_predict_layers=1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )


def batches(problems, tokenizer, batch_size: int, slips: float) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Padded `(token_ids, labels)` of prompts with worked solutions. Labels are -100 outside the response.

    `slips` is the probability of a wrong column in a solution.
    """
    for start in range(0, len(problems), batch_size):
        rows = []
        for i in range(start, start + batch_size):
            problem = problems[i]
            prompt = tokenizer.encode(problem["question"] + "\n")
            worked = solution(problem["metadata"]["expression"], seed=i, slips=slips)
            answer = [*tokenizer.encode(worked), tokenizer.eos_token_id]
            rows.append((prompt, answer))
        width = max(len(p) + len(a) for p, a in rows)
        ids = torch.full((len(rows), width), tokenizer.pad_token_id)
        labels = torch.full((len(rows), width), -100)
        for r, (p, a) in enumerate(rows):
            ids[r, : len(p) + len(a)] = torch.tensor(p + a)
            labels[r, len(p) : len(p) + len(a)] = torch.tensor(a)
        yield ids, labels


def train_policy(
    family: str,
    dataset,
    validation,
    tokenizer,
    *,
    steps: int,
    slips: float,
    batch_size: int = 64,
    lr: float = 2e-3,
    seed: int = 0,
    evaluate_every: int = 50,
    router_coefficient: float = 0.0,
    records: Path | None = None,
) -> PreTrainedModel:
    """A new policy of this family (FAMILIES). `router_coefficient`: weight of the load-balancing loss
    (drafters/expert_routing.py), over the tokens from which solutions are predicted. `records`: a folder for
    steps.jsonl, with the loss and the experts' load of each step, and for the plot router.png."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(policy_config(family, tokenizer)).float()
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min(1.0, (s + 1) / 50) * min(1.0, (steps - s) / (0.3 * steps))
    )
    started, tokens = time.time(), 0
    losses, routed, rights = {}, {}, {}
    with Progress() as progress, reading_routers(find_routers(model)) as read:
        bar = progress.add_task(f"{family}: supervised", total=steps)
        for step, (ids, labels) in enumerate(batches(dataset, tokenizer, batch_size, slips)):
            if step == steps:
                break
            logits = model(input_ids=ids, attention_mask=(ids != tokenizer.pad_token_id).long()).logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            taught_N = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1)).flatten().nonzero().squeeze(1)
            routing = read.routing(taught_N)
            balance = read.loss(taught_N, routing.frequencies_LE, tokens=routing.tokens)
            optimiser.zero_grad()
            (loss + router_coefficient * balance).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            tokens += ids.numel()
            losses[step + 1], routed[step + 1] = loss.item(), router_metrics(routing)
            progress.advance(bar)
            if (step + 1 >= 0.7 * steps and (step + 1) % evaluate_every == 0) or step + 1 == steps:
                problems = [validation[i] for i in range(256)]
                accuracy, length = right_and_length(validation, problems, tokenizer, sample(model, tokenizer, problems))
                rights[step + 1] = accuracy
                progress.console.print(
                    f"{family}, step {step + 1}: loss {loss.item():.4f}, right at temperature 1 {accuracy:.1%}, "
                    f"mean response {length:.1f}, {tokens / (time.time() - started):.0f} tokens/s; "
                    f"{routing_line(routing)}"
                )
    if records is not None:
        records.mkdir(parents=True, exist_ok=True)
        lines = [
            {"step": step, "loss": loss, "right": rights.get(step), **routed[step].model_dump()}
            for step, loss in losses.items()
        ]
        (records / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        plot_routers(records / "router.png", routed)
    return model


def routing_line(routing: Routing) -> str:
    of_equal_LE = routing.load_LE * routing.load_LE.shape[1]
    return (
        f"experts: loads {of_equal_LE.min():.2f} to {of_equal_LE.max():.2f} of an equal share, "
        f"router entropy {routing.entropy_L.mean():.2f} nats, load-balancing loss {routing.loss:.3f}"
    )
