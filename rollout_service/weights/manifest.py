"""Manifest of an update: its tensors by name, shape and dtype, and what differs from those in service."""

from drafters.files.checkpoint_folder import TensorSpec, is_unused_buffer
from rollout_service.protocol import Problem

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
FLOATING = {"F64", "F32", "BF16", "F16"}


def problems(update: dict[str, TensorSpec], expected: dict[str, TensorSpec], dtype: str) -> list[Problem]:
    """Everything that keeps `update` from replacing `expected` as a whole in an engine of `dtype` (e.g. float32).

    An update may hold buffers that nobody loads, as a checkpoint may. The engine ignores them.
    """
    missing = "missing; an update must hold every tensor"
    found = [Problem(field=name, message=missing) for name in expected if name not in update]
    for name, (shape, given) in update.items():
        if is_unused_buffer(name):
            continue
        if name not in expected:
            found.append(Problem(field=name, message="unknown; the checkpoint in service has no tensor of this name"))
            continue
        wanted = expected[name]
        wanted_dtype = DTYPES[dtype] if wanted.dtype in FLOATING else wanted.dtype
        if shape != wanted.shape:
            found.append(Problem(field=name, message=f"shape {list(shape)}, expected {list(wanted.shape)}"))
        if given != wanted_dtype:
            found.append(Problem(field=name, message=f"dtype {given}, expected {wanted_dtype}"))
    return found
