"""The run of `drafters train` after its configuration is read: build or load the learner, train, validate, write.

out/                    the drafter's checkpoint, which vLLM loads unchanged
out/training/
  config.json           the configuration of the run
  acceptance.jsonl      acceptance by position on held-out samples, by step
  acceptance.png        a plot of the loss and of that acceptance
  state.safetensors     everything that `--resume` needs
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

import drafters.latent_moe  # noqa: F401  (which transformers then knows)
from drafters.devices import choose_device
from drafters.files.checkpoint_folder import weight_files
from drafters.files.disk_space import told_if_full
from drafters.files.durable import check_folder, make_folders, replacing, replacing_files
from drafters.files.model_folder import resolve_model
from drafters.files.text_lines import json_lines
from drafters.learners.factory import load_learner, new_learner
from drafters.learners.learner import DrafterLearner, cast
from drafters.training.config import TrainDrafterConfig
from drafters.training.data import read_samples
from drafters.training.offline import OfflineTrainer, split, train_offline

STATE, VALIDATION = "state.safetensors", "acceptance.jsonl"


def train_drafter(config: TrainDrafterConfig) -> list[float]:
    """Trains and writes a drafter. Returns its predicted acceptance by position on held-out samples, as it was written.

    Raises ValueError and OSError, which name the field, before any training. KeyboardInterrupt leaves a state from
    which `--resume` goes on.
    """
    console = Console()
    transformers_logging.disable_progress_bar()
    if config.threads:
        torch.set_num_threads(config.threads)
    records = config.out / "training"
    check_out(config, records)
    device = choose_device(config.device)
    with console.status(f"loading {config.policy} and {config.data}"):
        folder = resolve_model(config.policy, "policy")
        policy = load_policy(folder, device)
        samples = read_samples(
            config.data, AutoTokenizer.from_pretrained(folder), max_length=config.max_length, most=config.samples
        )
        training, held_out = split(samples, config.validation)
        check_samples(config, len(training))
        learner = make_learner(config, policy, [sample.response for sample in training]).to(device)
    trainer = OfflineTrainer(learner, policy, training, config.training)
    validations: list[dict[str, Any]] = []
    make_folders(records)
    if config.resume and (records / STATE).is_file():
        trainer.restore(load_file(records / STATE))
        written: Iterator[dict[str, Any]] = json_lines(records / VALIDATION)
        validations = [entry for entry in written if entry["step"] <= trainer.step]
    (records / "config.json").write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
    console.print(
        f"{config.kind} for {config.policy}: {sum(p.numel() for p in learner.parameters()):,} parameters, "
        f"{len(training):,} samples, {len(held_out):,} held out",
        soft_wrap=True,
    )

    def validated(step: int, by_position: list[float]) -> None:
        validations.append(
            {"step": step, "acceptance_length": 1 + sum(by_position), "acceptance_by_position": by_position}
        )
        with replacing(records / VALIDATION) as partial:
            partial.write_text("".join(json.dumps(entry) + "\n" for entry in validations), encoding="utf-8")

    def write() -> None:
        what = f"the state of step {trainer.step} and the drafter"
        with told_if_full(what, config.out, lambda: written_bytes(learner, folder)):
            with replacing(records / STATE) as partial:
                save_file(trainer.state(), partial)
            with replacing_files(config.out) as files:
                learner.write(files, folder, getattr(torch, config.dtype))
            plot(records / "acceptance.png", trainer.losses, validations)

    def after_step(step: int) -> None:
        if step % config.save_every == 0 and step < config.training.steps:
            write()

    try:
        train_offline(trainer, config.kind, held_out, validated, after_step)
    finally:
        if trainer.step:
            write()
    learner.load_checkpoint(cast(cast(learner.checkpoint(), getattr(torch, config.dtype)), torch.float32))
    by_position = trainer.validate(held_out)
    console.print(
        f"acceptance length {1 + sum(by_position):.3f}, by position "
        f"{', '.join(f'{share:.1%}' for share in by_position)}; written to {config.out}",
        soft_wrap=True,
    )
    return by_position


def written_bytes(learner: DrafterLearner, policy: Path) -> int:
    """Roughly the bytes that a state and a checkpoint take: the weights twice, and AdamW's two moments of each weight.

    A head in a policy's folder also counts the policy, which is copied if it is on another disk.
    """
    copied = sum(file.stat().st_size for file in weight_files(policy)) if learner.in_policy_folder else 0
    return 4 * sum(parameter.nbytes for parameter in learner.parameters()) + copied


def check_out(config: TrainDrafterConfig, records: Path) -> None:
    check_folder(config.out, "out")
    state = records / STATE
    if not config.resume and state.is_file():
        raise ValueError(f"out: {config.out} holds a training run: go on with --resume, or choose another folder")


def check_samples(config: TrainDrafterConfig, count: int) -> None:
    if count < config.training.batch_size:
        raise ValueError(
            f"training.batch_size: a step needs {config.training.batch_size} samples, but {config.data} has {count} "
            "to train on; give more data or a smaller batch"
        )


def load_policy(folder: Path, device: torch.device) -> PreTrainedModel:
    """The frozen policy: in float32 on a CPU, and in its own dtype on a GPU, where it takes most of the memory."""
    dtype: Any = torch.float32 if device.type == "cpu" else "auto"
    policy: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return policy.to(device).eval().requires_grad_(False)


def make_learner(config: TrainDrafterConfig, policy: PreTrainedModel, texts: list[list[int]]) -> DrafterLearner:
    torch.manual_seed(config.training.seed)
    if config.init is None:
        return new_learner(config.kind, policy, config.head, texts)
    return load_learner(config.kind, resolve_model(config.init, "init"), policy)


def plot(file: Path, losses: list[float], validations: list[dict[str, Any]]) -> None:
    """Two plots by step: the loss above, acceptance by position below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    loss, acceptance = figure.subplots(2, 1, sharex=True)
    loss.plot(range(1, len(losses) + 1), losses, linewidth=0.8)
    loss.set_ylabel("loss")
    steps = [entry["step"] for entry in validations]
    for position, shares in enumerate(zip(*(e["acceptance_by_position"] for e in validations), strict=True), start=1):
        acceptance.plot(steps, shares, marker=".", label=f"position {position}")
    acceptance.set_ylim(0, 1)
    acceptance.set_xlabel("step")
    acceptance.set_ylabel("accepted, held-out samples")
    acceptance.legend()
    for axes in (loss, acceptance):
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
