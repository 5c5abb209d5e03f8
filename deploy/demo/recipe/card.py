"""The model card of the demo's models: data, seeds, steps, final figures, sizes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drafters.training.config import OfflineTraining


@dataclass(frozen=True)
class Figures:
    policy_steps: int
    slips: float
    batch_size: int
    right: float
    length: float
    held_out: int
    samples: int
    training: OfflineTraining
    acceptance: dict[str, list[float]]
    """predicted share of draft steps that accept at least 1, 2, ... tokens, by drafter"""
    task: dict[str, Any]
    training_seed: int
    held_out_seed: int


CARD = """---
license: apache-2.0
---
# Demo models

Made by `make demo-models` (deploy/demo/recipe/make_models.py). For demonstrations and tests of this project only.

| file | what | bytes |
|---|---|---:|
{sizes}

Weights are bfloat16, safetensors; vLLM loads each folder as it is. `policy/` holds the policy (`model.safetensors`) and
its MTP head (`mtp.safetensors`).

## Policy
A Qwen3-Next with full attention in every layer, 2.0 M parameters, and a tokenizer of single digits, signs and words.
Supervised training: {policy_steps} steps of {batch_size} problems with worked solutions, AdamW, seed 0. In the
solutions each column is wrong with chance {slips:.0%}, and all that follows is built on it: the policy learns the
method and the slips, and reinforcement learning has the slips to unlearn.
Data: reasoning-gym `chain_sum`, {task}; problems seeded from {training_seed} for training and from {held_out_seed} for
what is held out. Prompt: the question and a newline.

On {held_out} held-out prompts, temperature 1: **{right:.1%} right**, mean response **{length:.1f} tokens**.

## Drafters
Each trained on {samples} samples of the policy (temperature 1, training prompts): {steps} steps of {drafter_batch}
samples, AdamW, peak learning rate {learning_rate}, cosine, loss {loss} over {draft_steps} draft steps (each weighing
{step_decay} of the one before), seed {seed}.

Predicted on samples for the held-out prompts, {draft_tokens} draft tokens, temperature 1, probabilistic drafts:

| drafter | acceptance length | acceptance by position |
|---|---:|---|
{acceptance}
"""


def write_card(folder: Path, figures: Figures) -> None:
    """Write `README.md` in `folder`, which holds one folder for each model."""
    models = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*.safetensors"))}
    what = {
        "policy/model.safetensors": "policy",
        "policy/mtp.safetensors": "its MTP head",
        "eagle3/model.safetensors": "Eagle3 head",
        "draft_model/model.safetensors": "small draft model (Qwen3)",
    }
    training = figures.training
    text = CARD.format(
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
