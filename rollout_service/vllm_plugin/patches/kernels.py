"""Patches for the registration of the CPU's kernels."""

import sys
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

from rollout_service.vllm_plugin.patch import defect


def kernels_are_rebound() -> bool:
    """A kernel's copy in another module is rebound, even beside an object that has every attribute (llvmlite's)."""
    dispatcher: Any = import_module("vllm.triton_utils.dispatcher")

    class AnswersAll:
        def __getattribute__(self, name: str) -> Any:
            return print

    def kernel() -> None: ...

    module: Any = ModuleType("rollout_service_self_test")
    module.first, module.copy = AnswersAll(), kernel
    sys.modules[module.__name__] = module
    try:
        dispatcher._rebind_kernels([(kernel, "rebound")])
    finally:
        del sys.modules[module.__name__]
    return module.copy == "rebound"


def replace_rebind_kernels() -> None:
    dispatcher: Any = import_module("vllm.triton_utils.dispatcher")

    def _rebind_kernels(overrides: list[tuple[Any, Any]]) -> None:
        """Rebind attributes of modules, and the attribute `kernel` of their values, if they are an original kernel."""
        wrappers = {id(original): wrapper for original, wrapper in overrides}
        for module in list(sys.modules.values()):
            for name, value in list((getattr(module, "__dict__", None) or {}).items()):
                if id(value) in wrappers:
                    setattr(module, name, wrappers[id(value)])
                    continue
                own = getattr(value, "__dict__", None)
                if isinstance(own, Mapping) and id(own.get("kernel")) in wrappers:
                    value.kernel = wrappers[id(own["kernel"])]
                    if not isinstance(value, type):
                        value.__dict__.pop("_kernel_arg_names", None)

    dispatcher._rebind_kernels = _rebind_kernels


KERNELS = [
    defect(
        "vllm.triton_utils.dispatcher._rebind_kernels",
        "it fails on modules that hold objects without a plain __dict__, such as llvmlite's, which n-grams load. The "
        "CPU kernels of a second engine in a process cannot be registered then",
        kernels_are_rebound,
        replace_rebind_kernels,
    ),
]
