"""The environment that an engine's process gets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rollout_service.engine.hardware import engine_environment, interpreter, preloads

SHOW = "import sys; print(sys.prefix); print(open('/proc/self/maps', encoding='utf-8').read())"


@pytest.fixture(params=["installed", "an installation's"])
def installation(request, tmp_path, monkeypatch):
    """This environment under another path."""
    folder = tmp_path / request.param
    folder.symlink_to(sys.prefix)
    monkeypatch.setattr("sys.prefix", str(folder))
    monkeypatch.setattr("sys.executable", str(folder / "bin" / "python"))
    return folder


def test_an_engines_interpreter_and_libraries_are_found_at_any_installation_path(installation):
    python = interpreter().get("py_executable", sys.executable)
    arguments = ["bash", "-c", f'exec {python} -c "{SHOW}"']  # as Ray starts a worker
    environment = os.environ | engine_environment("cpu", threads=1)
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""  # here the loader reports missing libraries
    prefix, loaded = done.stdout.split("\n", 1)
    assert prefix == str(installation)
    for library in preloads()["LD_PRELOAD"].split(":"):
        assert Path(library).name.split(".so")[0] in loaded


def test_a_gpu_engine_uses_the_only_sampler_that_was_checked():
    assert engine_environment("cuda", threads=1)["VLLM_USE_FLASHINFER_SAMPLER"] == "0"


def test_libraries_on_the_users_own_path_are_still_found(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.prefix", str(tmp_path / "a space"))
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/lib")
    assert preloads()["LD_LIBRARY_PATH"] == f"{tmp_path}/a space/lib:/opt/lib"
