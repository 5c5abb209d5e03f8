"""The forked core: what the actor's server imports opens no CUDA context, so that a core process can be forked from it.

torch notes in a process that CUDA was asked for, even if there is no driver, and a forked child then refuses to use it.
"""

import subprocess
import sys

import pytest

FORKED = """
import contextlib, importlib, os, sys, torch

with contextlib.suppress(RuntimeError):  # there is no driver
    importlib.import_module(sys.argv[1])
child = os.fork()
if child == 0:
    os._exit(torch.cuda._is_in_bad_fork())
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize(
    ("module", "poisons"),
    [("rollout_service.vllm_plugin.preloaded", False), ("vllm.model_executor.models.qwen3_next", True)],
)
def test_a_child_can_use_cuda_after_the_preloaded_modules_but_not_after_a_model(module, poisons):
    run = subprocess.run([sys.executable, "-c", FORKED, module], capture_output=True, text=True, check=True)
    assert int(run.stdout.splitlines()[-1]) == poisons


CORE = """
import sys
from rollout_service.vllm_plugin.core_process import CoreContext, prepare_core_process

def core():
    imported = "vllm.v1.engine.core" in sys.modules
    import torch
    from vllm.platforms import current_platform
    print(imported, current_platform.is_cuda(), torch.cuda._is_in_bad_fork(), flush=True)

if __name__ == "__main__":
    prepare_core_process()
    process = CoreContext().Process(target=core)
    process.start()
    process.join()
"""


def test_a_core_process_is_forked_with_vllm_imported_and_can_use_cuda(tmp_path):
    script = tmp_path / "actor.py"
    script.write_text(CORE)
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["True", "True", "False"]
