"""The server that vLLM's core process is forked from."""

import subprocess
import sys


def said(code: str) -> str:
    """Run `code` in a Python process, and return the last word that it prints."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def test_what_it_imports_starts_no_thread_that_a_fork_would_lose():
    """OpenBLAS's threads handle forks, and are not started here."""
    code = """
import os
os.environ["OPENBLAS_NUM_THREADS"] = "1"
import rollout_service.vllm_plugin.preloaded
print(len(os.listdir("/proc/self/task")))
"""
    assert said(code) == "1"


def test_vllm_takes_its_core_process_from_it():
    code = """
from rollout_service.vllm_plugin.core_process import CORE_PROCESS
from vllm.v1.engine import utils
CORE_PROCESS.ensure()
print(type(utils.get_mp_context()).__name__)
"""
    assert said(code) == "CoreContext"
