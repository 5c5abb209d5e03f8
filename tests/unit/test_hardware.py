"""The environment that an engine's process gets."""

import os
import subprocess
import sys
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from rollout_service.config import ServiceConfig
from rollout_service.engine.hardware import engine_environment, interpreter, preloads
from rollout_service.fleet.resources import check_machine

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


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "ieee"), ("bfloat16", None)])
def test_a_gpu_engine_in_float32_multiplies_in_float32(dtype, precision):
    assert engine_environment("cuda", 1, dtype).get("TRITON_F32_DEFAULT") == precision
    assert "TRITON_F32_DEFAULT" not in engine_environment("cpu", 1, dtype)


@pytest.mark.parametrize(("installed", "fits"), [("0.32.0", False), ("0.32.0+cpu", True), (None, True)])
def test_a_cpu_engine_with_the_wheel_for_gpus_is_refused_before_it_starts(installed, fits, monkeypatch):
    def version(name):
        if installed is None:
            raise PackageNotFoundError(name)
        return installed

    monkeypatch.setattr("rollout_service.engine.hardware.version", version)
    with nullcontext() if fits else pytest.raises(ValueError, match=r"engine\.device: is cpu here, but the installed"):
        check_machine(ServiceConfig(model="m", engine={"device": "cpu"}), "cpu")
