"""Checkpoints: everything a run needs to continue from the identical state, in safetensors and JSON, without pickle.

    output/checkpoints/step-000010/
      config.json, model.safetensors, tokenizer.json, ...   the policy, as any Hugging Face checkpoint
      trainer/optimiser.safetensors                         AdamW's state, `<parameter>.<key>`
      trainer/generators.safetensors                        torch's generators, of the CPU and of the learner's GPU
      trainer/state.json                                    RunState, the generators of Python and NumPy, and the
                                                            format's number (a file without one has format 1)
      mtp.safetensors                                       the policy's MTP head, if it has one, trained or not
      drafter/                                              any other trained drafter, as an engine loads it
      trainer/drafter.safetensors, trainer/drafter.json     its float32 weights and optimiser; version, update rule

A checkpoint is written to a hidden folder, synced, and renamed. A visible checkpoint is therefore complete, even after
a power loss, and a failed write leaves nothing. Only after the rename may the groups that it was trained on be
acknowledged. A run first writes a checkpoint of step 0, so its name is on disk before the service's queue knows it.
"""

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, Field
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from drafters.devices import choose_device
from drafters.files.disk_space import told_if_full
from drafters.files.durable import hidden, make_folders, making, sync
from drafters.files.stored_format import check_format
from drafters.scoring import SurprisalSums
from rl_loop.config import TrainConfig
from rl_loop.learner.online_drafter import OnlineDrafter
from rl_loop.learner.policy_learner import PolicyLearner

FORMAT = 1
"""format number of checkpoints; raise it when older checkpoints can no longer be read"""


class RunState(BaseModel):
    """The state of a run, except the policy and the optimiser."""

    step: int = 0
    """number of finished steps"""
    position: int = 0
    """index of the next training problem; those below it were handed out"""
    version: int = 0
    """weight version of the policy at the start of the last finished step"""
    run: str = ""
    """the run's name; the service's weights, and in asynchronous training its queued groups, belong to this name"""
    pushed: list[int] = Field(default_factory=list)
    """weight versions that this run pushed and that may have sampled tokens not yet trained on"""
    outstanding: list[int] = Field(default_factory=list)
    """asynchronous training: problems below `position` that are not trained on yet"""
    trained: list[str] = Field(default_factory=list)
    """asynchronous training: groups that were trained on and that the service may hand out again"""
    losslessness: SurprisalSums = Field(default_factory=SurprisalSums)
    """sums over all steps, for the running z"""


def checkpoint_folder(output: Path, step: int) -> Path:
    return output / "checkpoints" / f"step-{step:06d}"


def save_checkpoint(
    folder: Path,
    learner: PolicyLearner,
    tokenizer: PreTrainedTokenizerBase,
    state: RunState,
    drafter: OnlineDrafter | None = None,
) -> None:
    """When this returns, the checkpoint is on disk, and so are the run's records up to its step (metrics, groups).
    Raises NoRoom when the disk is full; earlier checkpoints stay."""
    make_folders(folder.parent)
    _remove_halves(folder.parent)
    what = f"the checkpoint of step {state.step}"
    with told_if_full(what, folder.parent, lambda: checkpoint_bytes(learner, drafter)), making(folder) as partial:
        (partial / "trainer").mkdir()
        learner.save(partial)
        tokenizer.save_pretrained(partial)
        save_file(
            _torch_generators(choose_device(learner.config.device)), partial / "trainer" / "generators.safetensors"
        )
        written = {
            "format": FORMAT,
            "run": state.model_dump(),
            "python": random.getstate(),
            "numpy": _numpy_generator(),
        }
        (partial / "trainer" / "state.json").write_text(json.dumps(written), encoding="utf-8")
        if drafter is not None:
            drafter.save(partial)
        for records in folder.parents[1].glob("*.jsonl"):
            sync(records)


def checkpoint_bytes(learner: PolicyLearner, drafter: OnlineDrafter | None) -> int:
    """The approximate size of a checkpoint on disk."""
    return learner.checkpoint_bytes() + (0 if drafter is None else drafter.checkpoint_bytes())


def prune_checkpoints(output: Path, keep: int) -> None:
    """Remove all but the latest `keep` checkpoints."""
    for old in checkpoints(output)[:-keep]:
        old.rename(hidden(old))  # hide it before the removal: a visible checkpoint must be complete
    _remove_halves(output / "checkpoints")


def _remove_halves(folder: Path) -> None:
    """Remove checkpoints that a killed trainer was writing or removing."""
    for half in folder.glob(".step-*"):
        shutil.rmtree(half)


def checkpoints(output: Path) -> list[Path]:
    """The complete checkpoints, earliest first."""
    folders = (output / "checkpoints").glob("step-*")
    return sorted(folder for folder in folders if re.fullmatch(r"step-\d+", folder.name))


def checkpoint_to_resume(config: TrainConfig) -> Path | None:
    """The latest checkpoint. None if the run is not resumed, or ended before its first checkpoint."""
    found = checkpoints(config.output) if config.resume else []
    return found[-1] if found else None


def read_state(folder: Path) -> RunState:
    """The checkpoint's RunState alone. Raises OtherFormat."""
    return RunState.model_validate(_read(folder)["run"])


def restore_checkpoint(folder: Path, learner: PolicyLearner, drafter: OnlineDrafter | None = None) -> RunState:
    """Restore the learner, the drafter and all random generators. Raises OtherFormat, and what the learner raises when
    the checkpoint does not fit it."""
    read = _read(folder)
    learner.load(folder)
    if drafter is not None:
        drafter.restore(folder)
    states = load_file(folder / "trainer" / "generators.safetensors")
    _restore_torch_generators(states, choose_device(learner.config.device))
    version, internal, gauss_next = read["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, *rest = read["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    return RunState.model_validate(read["run"])


def _read(folder: Path) -> dict[str, Any]:
    file = folder / "trainer" / "state.json"
    read = json.loads(file.read_text(encoding="utf-8"))
    check_format(file, read.get("format", 1), FORMAT)
    return read


def _torch_generators(device: torch.device) -> dict[str, Tensor]:
    """The states of the CPU's generator and of the learner's GPU. Those of other GPUs are not used, and to read one
    would take memory on its GPU."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def _restore_torch_generators(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:  # a run may go on where it has a GPU and had none
        torch.cuda.set_rng_state(states["cuda"], device)


def _numpy_generator() -> list[Any]:
    name, keys, *rest = np.random.get_state(legacy=True)
    return [name, keys.tolist(), *rest]  # type: ignore[union-attr]
