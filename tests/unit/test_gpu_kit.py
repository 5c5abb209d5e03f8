"""The checks of the CUDA path: their bundle keeps what an H100 runs, and their documents name stages that exist."""

import ast
import re
import runpy
import shlex
import struct
import sys
from pathlib import Path
from unittest import mock

import pytest

GPU = Path(__file__).parents[2] / "deploy" / "gpu"
parsed = runpy.run_path(str(GPU / "checks" / "check.py"))["parsed"]
stripped = runpy.run_path(str(GPU / "strip_cubins.py"))["stripped"]

H100, A100 = 90, 80
MACHINE_CODE, PTX = 2, 1
LARGE_HEADS = b"_ZN" + b"a" * 60 + b"FlashAttnFwdSm90ELi256ENS_10bfloat16_tE"
HEADS_OF_64 = b"_ZN" + b"a" * 60 + b"FlashAttnFwdSm90ELi64ENS_10bfloat16_tE"


def entry(kind, capability, code):
    return struct.pack("<HHIQIIHHI", kind, 0x101, 64, len(code), 0, 0, 0, 0, capability).ljust(64, b"\0") + code


def library(*entries):
    """Bytes before and after a fat binary, which contain its magic number once by chance."""
    body = b"".join(entries)
    chance = struct.pack("<I", 0xBA55ED50) * 4
    return b"text" + chance + struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body + b"more text"


@pytest.mark.parametrize(
    ("kind", "capability", "is_kept"),
    [(MACHINE_CODE, H100, True), (MACHINE_CODE, A100, False), (PTX, H100, False)],
)
def test_only_the_machine_code_for_an_h100_is_kept(kind, capability, is_kept):
    before = library(entry(MACHINE_CODE, H100, b"first" * 20), entry(kind, capability, b"second" * 20))
    after, kept = stripped(before, attention=False)
    assert after == (before if is_kept else before.replace(b"second" * 20, bytes(120)))
    assert kept == 100 + 120 * is_kept


@pytest.mark.parametrize(("name", "is_kept"), [(HEADS_OF_64, True), (LARGE_HEADS, False), (b"no attention", True)])
def test_only_attention_kernels_that_the_checks_launch_are_kept(name, is_kept):
    before = library(entry(MACHINE_CODE, H100, name))
    after, _ = stripped(before, attention=True)
    assert after == (before if is_kept else before.replace(name, bytes(len(name))))


def commands(document):
    """The words of every stage in a document's commands."""
    for line in document.read_text().splitlines():
        if match := re.search(r"call\.sh ([a-z].*)", line):
            yield from (words.split(",") for words in re.split(r"[+ ]", match[1].split("`")[0].strip()))
        elif match := re.search(r"check\.py ([a-z].*)", line):
            yield shlex.split(match[1])


@pytest.mark.parametrize("document", [GPU / "README.md", GPU.parents[1] / "docs" / "gpu.md"], ids=lambda p: p.name)
def test_documents_name_stages_that_exist(document):
    stages = list(commands(document))
    assert stages
    for words in stages:
        assert parsed(words).stage == words[0]


def test_unknown_stages_are_refused(capsys):
    with pytest.raises(SystemExit):
        parsed(["engine", "mtp", "bfloat16", "auto", "graph"])
    assert "invalid choice: 'graph'" in capsys.readouterr().err


@pytest.mark.parametrize(("responses", "scale", "judged"), [(None, None, 1024), ("128", None, 128), (None, "64", 16)])
def test_fewer_responses_are_judged_on_request(monkeypatch, responses, scale, judged):
    for name, value in (("CHECK_RESPONSES", responses), ("CHECK_SCALE", scale)):
        if value:
            monkeypatch.setenv(name, value)
        else:
            monkeypatch.delenv(name, raising=False)
    assert runpy.run_path(str(GPU / "checks" / "common.py"))["RESPONSES"] == judged


def test_the_stand_in_for_ray_has_what_the_service_imports_from_it(monkeypatch):
    """A GPU machine without Ray has only the stand-in, and no other test of `make test` would notice what it lacks."""
    monkeypatch.syspath_prepend(str(GPU / "checks"))
    from without_ray import stand_in

    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in (GPU.parents[1] / "rollout_service").rglob("*.py")]
    imported = [
        (node.module, alias.name)
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "ray"
        for alias in node.names
    ]
    assert ("ray.exceptions", "RayTaskError") in imported
    with mock.patch.dict(sys.modules):
        stand_in()
        lacking = [(module, name) for module, name in imported if not hasattr(sys.modules[module], name)]
    assert lacking == []
