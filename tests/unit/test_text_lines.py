"""Lines of text: they end only at a line feed, text is UTF-8, and errors name the file, the line and what to do."""

import ast
import json
import re
from pathlib import Path

import pytest
import rl_toys as toys

from drafters.files.text_lines import byte_lines, json_lines, read_text
from drafters.training.data import read_samples
from rl_loop.task_config import TaskConfig
from rl_loop.tasks import TaskError, make_task
from rollout_service.evaluation import prompts

ROOT = Path(__file__).resolve().parents[2]
SEPARATORS = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r"]
"""characters at which `str.splitlines` or universal newlines end a line and JSON lines do not; JSON escapes those
below 0x20"""


@pytest.fixture(params=SEPARATORS, ids=ascii)
def separator(request) -> str:
    return request.param


def written(file: Path, *values) -> Path:
    file.write_bytes(b"".join(json.dumps(value, ensure_ascii=False).encode() + b"\n" for value in values))
    return file


def test_a_value_with_a_separator_is_one_line(separator, tmp_path):
    file = written(tmp_path / "a.jsonl", f"a{separator}b", "c")
    assert list(json_lines(file)) == [f"a{separator}b", "c"]
    assert [json.loads(line) for line in byte_lines(file)] == [f"a{separator}b", "c"]


def test_problems_samples_and_prompts_may_hold_separators(separator, tmp_path, monkeypatch):
    text = f"1{separator}2"
    of_task = [{"prompt": text, "answer": "1"}, {"prompt": "3", "answer": "3"}]
    task = make_task(TaskConfig(kind="jsonl", path=written(tmp_path / "task.jsonl", *of_task), prompt_suffix=""))
    assert task.prompt("train", 0).entry["prompt"] == text
    tokenizer = toys.character_tokenizer()
    data = written(tmp_path / "data.jsonl", {"prompt": text, "response": "12"}, {"text": f"34{separator}"})
    assert [sample.response[:2] for sample in read_samples(data, tokenizer, max_length=9)] == [
        tokenizer.encode("12"), tokenizer.encode("34")
    ]  # fmt: skip
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    found = prompts.read_prompts(str(tmp_path / "model"), written(tmp_path / "prompts.jsonl", {"prompt": text}))
    assert found == [tokenizer.encode(text)]


def test_carriage_returns_a_byte_order_mark_and_blank_lines_are_not_part_of_the_values(tmp_path):
    file = tmp_path / "windows.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}\r\n')
    assert list(json_lines(file)) == [{"a": 1}, {"a": 2}]
    assert json.loads(byte_lines(file)[0]) == {"a": 1}
    assert read_text(file).startswith("{")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "caf\xe9", "answer": "4"}', "byte 0xe9 is not UTF-8; save the file as UTF-8"),
        (rb'{"prompt": "half \ud83d", "answer": "4"}', r"\ud83d is half of a surrogate pair"),
        (rb'{"prompt": "half \uDE00", "answer": "4"}', r"\ude00 is half of a surrogate pair"),
        (b'{"prompt": ', "Expecting value"),
    ],
    ids=["latin1", "first-half", "second-half", "no-json"],
)
def test_a_line_that_is_not_text_is_named_with_its_file(line, message, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(b'{"prompt": "1", "answer": "1", "response": "2"}\n' + line + b"\n")
    with pytest.raises(TaskError, match=re.escape(message)) as task_error:
        make_task(TaskConfig(kind="jsonl", path=file))
    assert f"{file}, line 2: " in str(task_error.value)
    with pytest.raises(ValueError, match=re.escape(message)) as data_error:
        read_samples(file, toys.character_tokenizer(), max_length=9)
    assert str(data_error.value).startswith(f"data: {file}, line 2: ")


def test_both_halves_of_a_surrogate_pair_are_a_character(tmp_path):
    file = tmp_path / "emoji.jsonl"
    file.write_bytes(rb'"\ud83d\ude00"')
    assert list(json_lines(file)) == ["\U0001f600"]


def test_a_text_file_that_is_not_utf8_is_named_with_its_line(tmp_path):
    file = tmp_path / "bad.txt"
    file.write_bytes(b"one\ntwo\ncaf\xe9\n")
    with pytest.raises(ValueError, match="line 3: byte 0xe9 is not UTF-8"):
        read_text(file)
    with pytest.raises(ValueError, match=r"^data: .*line 3"):
        read_samples(file, toys.character_tokenizer(), max_length=9)


def method_calls(folder: str):
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                yield f"{file.name}:{node.lineno}", node.func.attr, node


@pytest.mark.parametrize("folder", ["drafters", "rollout_service", "rl_loop", "deploy"])
def test_nothing_else_in_the_project_decides_where_a_line_ends(folder):
    splitters = {"splitlines", "iter_lines", "aiter_lines", "readlines"}
    assert [where for where, method, _ in method_calls(folder) if method in splitters] == []


@pytest.mark.parametrize("folder", ["drafters", "rollout_service", "rl_loop", "deploy"])
def test_no_text_is_read_or_written_in_the_encoding_of_the_machine(folder):
    for where, method, call in method_calls(folder):
        modes = [str(argument.value) for argument in call.args if isinstance(argument, ast.Constant)]
        opens_text = method == "open" and (modes or not call.args) and not any("b" in mode for mode in modes)
        is_text = opens_text or method in ("read_text", "write_text")
        assert not is_text or "encoding" in {keyword.arg for keyword in call.keywords}, where
