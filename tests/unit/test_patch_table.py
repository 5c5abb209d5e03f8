"""The table of patches is complete, and any other vLLM than theirs is refused with the function's full name."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest

from rollout_service.vllm_plugin import patch, table
from rollout_service.vllm_plugin.patch import Patch

ROOT = Path(__file__).resolve().parents[2]


def made_of(**fields):
    return Patch(**{"name": "json.dumps", "reason": "", "when": "", "unneeded": "", "apply": lambda: None, **fields})


@pytest.mark.parametrize("row", table.PATCHES, ids=lambda row: row.name)
def test_a_row_is_complete_and_names_an_existing_test(row):
    assert row.name.startswith("vllm.")
    assert (ROOT / row.file).is_file()
    assert row.reason
    assert row.when
    assert row.unneeded
    assert row.is_right or row.shown_by
    if not row.is_right:
        assert row.name in row.relies_on
    if row.shown_by:
        file, test = row.shown_by.split("::")
        functions = ast.walk(ast.parse((ROOT / file).read_text()))
        assert test in [f.name for f in functions if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_the_installed_vllm_is_the_one_that_every_patch_was_written_for():
    assert [row.check() for row in table.PATCHES] == [None] * len(table.PATCHES)  # raises for another one


@pytest.mark.parametrize("row", [row for row in table.PATCHES if row.relies_on], ids=lambda row: row.name)
def test_another_vllm_is_refused_by_the_functions_full_name(row):
    name = next(iter(row.relies_on))
    with pytest.raises(RuntimeError, match=rf"{name}_gone: vLLM has no such function; {row.file} must be adapted"):
        replace(row, relies_on={f"{name}_gone": ""}).check()
    with pytest.raises(RuntimeError, match=rf"{name}\(.*\): {row.file} was written for \(other, ...\)"):
        replace(row, relies_on={name: "other, ..."}).check()


def test_a_patch_may_name_all_parameters_or_only_the_first():
    made_of(relies_on={"json.dump": "obj, fp, ...", "json.detect_encoding": "b"}).check()
    for wrong in ("obj, fp", "obj, f, ...", ""):
        with pytest.raises(RuntimeError, match=r"json\.dump"):
            made_of(relies_on={"json.dump": wrong}).check()


def test_a_function_that_no_longer_uses_what_a_patch_replaces_is_named():
    made_of(looked_up_in={"json.dumps": "JSONEncoder"}).check()
    with pytest.raises(RuntimeError, match=r"json\.dumps no longer looks up JSONDecoder"):
        made_of(looked_up_in={"json.dumps": "JSONDecoder"}).check()


@pytest.fixture
def applied(monkeypatch):
    monkeypatch.setattr(patch, "APPLIED", found := [])
    return found


def test_a_function_that_is_right_is_left_alone(applied):
    replaced = []
    assert not made_of(is_right=lambda: True, apply=lambda: replaced.append(1)).ensure()
    assert replaced == applied == []


def test_a_function_that_is_wrong_is_replaced_once(applied):
    replaced = []
    wrong = made_of(is_right=lambda: bool(replaced), apply=lambda: replaced.append(1))
    assert [wrong.ensure(), wrong.ensure()] == [True, False]
    assert (replaced, applied) == ([1], ["json.dumps"])


def test_a_function_that_stays_wrong_after_its_patch_ends_the_start(applied):
    with pytest.raises(RuntimeError, match=r"json\.dumps .*refusing to serve"):
        made_of(is_right=lambda: False).ensure()
    assert applied == []


def test_a_patch_is_not_applied_to_another_vllm(applied):
    replaced = []
    with pytest.raises(RuntimeError, match="must be adapted"):
        made_of(relies_on={"json.dumps": "obj"}, apply=lambda: replaced.append(1)).ensure()
    with pytest.raises(RuntimeError, match="must be adapted"):
        made_of(relies_on={"json.dumps": "obj"}, apply=lambda n: replaced.append(n)).apply_to(1)
    assert replaced == applied == []
