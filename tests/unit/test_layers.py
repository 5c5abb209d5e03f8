"""Imports go down only: rl_loop uses rollout_service's client and protocol, and both use drafters."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

from rollout_service import protocol

ROOT = Path(__file__).resolve().parents[2]


def imports(package):
    for file in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                yield from ((file, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield from ((file, f"{node.module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize(
    ("package", "forbidden", "allowed"),
    [
        ("drafters", ("rollout_service", "rl_loop", "ray", "vllm", "fastapi", "httpx"), ()),
        ("rollout_service", ("rl_loop",), ()),
        ("rollout_service/adapters", ("ray", "vllm"), ()),
        ("rl_loop", ("ray", "vllm", "rollout_service"), ("rollout_service.client.", "rollout_service.protocol.")),
    ],
)
def test_a_package_imports_only_what_is_below_it(package, forbidden, allowed):
    found = list(imports(package))
    assert found
    upward = [
        (str(file), name)
        for file, name in found
        if name.split(".")[0] in forbidden and not name.startswith(allowed or ("nothing",))
    ]
    assert upward == []


def test_the_client_needs_neither_vllm_nor_ray_nor_torch():
    code = (
        "import sys, rollout_service.client; print(sorted({'vllm', 'ray', 'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_adapter_is_imported_without_the_trainer_that_it_is_for():
    code = (
        "import sys, rollout_service.adapters.trl; "
        "print(sorted({'vllm', 'ray', 'trl', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_of_the_interface_is_exported_by_its_package():
    missing = []
    for file in pkgutil.iter_modules(protocol.__path__):
        module = importlib.import_module(f"{protocol.__name__}.{file.name}")
        own = ast.parse(Path(str(module.__file__)).read_bytes()).body
        names = {target.id for node in own if isinstance(node, ast.Assign) for target in node.targets}
        names |= {node.name for node in own if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        missing += sorted(names - set(protocol.__all__))
    assert missing == []
