"""Model card of the demo's models: data, seeds, steps, results, sizes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drafters.training.config import OfflineTraining


@dataclass(frozen=True)
class Figures:
    family: str
    """of the policy, as `model_type`"""
    parameters: int
    active: int
    """parameters that one token passes"""
    router_coefficient: float
    policy_steps: int
    slips: float
    batch_size: int
    right: float
    length: float
    held_out: int
    samples: int
    training: OfflineTraining
    acceptance: dict[str, list[float]]
    """predicted shares of draft steps that accept at least 1, 2, ... tokens, by drafter"""
    task: dict[str, Any]
    training_seed: int
    held_out_seed: int


CARD = """---
license: apache-2.0
---
# {title}

`make demo-models` (deploy/demo/recipe/make_models.py) made these models for the demo and the tests of this project.

| file | content | bytes |
|---|---|---:|
{sizes}

Weights are bfloat16 in safetensors files. vLLM loads each folder unchanged. `policy/` holds the policy
(`model.safetensors`) and its MTP head (`mtp.safetensors`).

## Policy
The policy is a {architecture} with full attention in every layer and {parameters} million parameters, of which a token
passes {active} million. Its tokenizer has single digits, signs and words. Supervised training took {policy_steps} steps
of {batch_size} problems with worked solutions, with AdamW and seed 0{balanced}.

In the solutions each column is wrong with probability {slips:.0%}, and later columns build on the wrong one. So the
policy learns the method and the errors, and reinforcement learning can unlearn the errors.

Problems come from reasoning-gym's `chain_sum` with {task}.
Seeds begin at {training_seed} for training and at {held_out_seed} for held-out problems. A prompt is the question and
a newline.

On {held_out} held-out prompts at temperature 1, {right:.1%} of the answers are right. A response has on
average {length:.1f} tokens.

## Drafters
Each drafter was trained on {samples} samples of the policy for the training prompts at temperature 1. Training took
{steps} steps of {drafter_batch} samples with AdamW, a cosine schedule with peak learning rate {learning_rate}, and
seed {seed}. The loss is {loss} over {draft_steps} draft steps. Each draft step has {step_decay} times the weight of the
step before it.

Acceptance is predicted on samples for the held-out prompts, with {draft_tokens} probabilistic draft tokens at
temperature 1:

| drafter | acceptance length | acceptance by position |
|---|---:|---|
{acceptance}
"""


def write_card(folder: Path, figures: Figures) -> None:
    """Writes `README.md` in `folder`, which holds one folder for each model."""
    models = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.glob("*/*.safetensors"))}
    latent = figures.family == "latent_moe"
    what = {
        "policy/model.safetensors": "policy",
        "policy/mtp.safetensors": "its MTP head",
        "eagle3/model.safetensors": "Eagle3 head",
        "draft_model/model.safetensors": "small draft model (Qwen3)",
    }
    training = figures.training
    text = CARD.format(
        title="Demo models, LatentMoE" if latent else "Demo models",
        architecture="LatentMoE" if latent else "Qwen3-Next",
        parameters=f"{figures.parameters / 1e6:.2f}",
        active=f"{figures.active / 1e6:.2f}",
        balanced=f", and {figures.router_coefficient:g} times the load-balancing loss" if latent else "",
        sizes="\n".join(f"| {name} | {what[name]} | {size:,} |" for name, size in models.items()),
        task=", ".join(f"{key} {value}" for key, value in figures.task.items()),
        policy_steps=figures.policy_steps,
        slips=figures.slips,
        batch_size=figures.batch_size,
        right=figures.right,
        length=figures.length,
        training_seed=f"{figures.training_seed:,}",
        held_out_seed=f"{figures.held_out_seed:,}",
        held_out=figures.held_out,
        samples=figures.samples,
        steps=training.steps,
        drafter_batch=training.batch_size,
        learning_rate=training.learning_rate,
        loss=training.loss,
        draft_steps=training.draft_steps,
        step_decay=training.step_decay,
        seed=training.seed,
        draft_tokens=max(map(len, figures.acceptance.values())),
        acceptance="\n".join(
            f"| {kind} | {1 + sum(positions):.2f} | {', '.join(f'{p:.1%}' for p in positions)} |"
            for kind, positions in figures.acceptance.items()
        ),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
