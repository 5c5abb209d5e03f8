"""Updates from safetensors files on the service's machine: a checkpoint's folder, or single files."""

import itertools
from pathlib import Path
from typing import Any

from safetensors import safe_open

from drafters.files.checkpoint_folder import TensorSpec, tensor_specs, weight_files
from rollout_service.engine.update_file import HEAD, UpdateFile
from rollout_service.transports.transport import refused


def folder_files(folder: Any) -> list[Path]:
    """The safetensors files of a checkpoint on this machine. Raises RefusedUpdate when there are none, or when one that
    its index names is missing."""
    if not isinstance(folder, str) or not folder:
        raise refused("weight_dir", "must be the path of a folder on the service's machine")
    path = Path(folder)
    if not path.is_dir():
        raise refused("weight_dir", f"{folder} is no folder on the service's machine")
    try:
        files = weight_files(path)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise refused("weight_dir", f"{folder}: its index is not readable; is it still being written?") from None
    if not files:
        raise refused("weight_dir", f"{folder} holds no safetensors files; is it still being written?")
    if missing := [file.name for file in files if not file.is_file()]:
        raise refused("weight_dir", f"{folder} lacks {', '.join(missing)}; is it still being written?")
    return files


def write_files(update: UpdateFile, files: list[Path]) -> None:
    """Write the tensors of safetensors files. All are judged by their headers before the first is written. Raises
    RefusedUpdate."""
    specs: dict[str, TensorSpec] = {}
    of_file: dict[str, Path] = {}
    for file in files:
        try:
            here = tensor_specs(file)
        except ValueError as error:
            raise refused("weight_dir", f"{file}: {error}; is it still being written?") from None
        specs |= here
        of_file |= dict.fromkeys(here, file)
    update.rules.check(specs)
    # A head that is tied to the embedding is compared with it, so it comes last.
    for file, names in itertools.groupby(sorted(of_file, key=lambda name: name == HEAD), of_file.__getitem__):
        with safe_open(file, "pt") as tensors:
            update.write((name, tensors.get_tensor(name)) for name in names)
