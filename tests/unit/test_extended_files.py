"""A configuration that extends another: which value overrides which, and errors in one line."""

import pytest

from drafters.files.toml_file import merged
from drafters.settings import read_command_line
from rollout_service.config import ServiceConfig
from rollout_service.evaluation.compare_config import CompareConfig


def read(file, *flags):
    return read_command_line(ServiceConfig, "launch", ["--config", str(file), *flags])


def refused(file, capsys):
    with pytest.raises(SystemExit) as stop:
        read(file)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture
def files(tmp_path):
    """A policy's file, a node's file that extends it, and an experiment that extends both, each in its own folder."""
    folders = [tmp_path / name for name in ("base", "node", "run")]
    texts = [
        'model = "m"\nport = 9000\n[engine]\nmax_num_seqs = 8\nseed = 3\n[drafter]\nkind = "ngram"\n',
        'extends = "../base/service.toml"\nport = 9001\n[engine]\nmax_num_seqs = 16\n',
        'extends = "../node/service.toml"\n[drafter]\ndraft_tokens = 2\n',
    ]
    for folder, text in zip(folders, texts, strict=True):
        folder.mkdir()
        (folder / "service.toml").write_text(text, encoding="utf-8")
    return [folder / "service.toml" for folder in folders]


def test_a_file_overrides_its_base_field_by_field_and_flags_override_both(files):
    config = read(files[2], "--engine.seed", "4")
    assert (config.model, config.port, config.engine.max_num_seqs, config.engine.seed) == ("m", 9001, 16, 4)
    assert (config.drafter.kind, config.drafter.draft_tokens) == ("ngram", 2)
    assert read(files[0]).engine.max_num_seqs == 8


def test_a_list_replaces_that_of_the_base(tmp_path):
    assert merged({"a": [1, 2], "b": {"c": 1, "d": 2}}, {"a": [3], "b": {"d": 4}}) == {"a": [3], "b": {"c": 1, "d": 4}}
    (tmp_path / "base.toml").write_text('model = "m"\n[[drafters]]\nkind = "ngram"\n', encoding="utf-8")
    over = f'extends = "base.toml"\nprompts = "{__file__}"\n[[drafters]]\nkind = "mtp"\n'
    (tmp_path / "compare.toml").write_text(over, encoding="utf-8")
    config = read_command_line(CompareConfig, "compare", ["--config", str(tmp_path / "compare.toml")])
    assert [drafter.kind for drafter in config.drafters] == ["mtp"]


def test_files_that_extend_each_other_in_a_circle_give_an_error_of_one_line(files, capsys):
    files[0].write_text('extends = "../run/service.toml"\n', encoding="utf-8")
    assert " -> ".join(map(str, [files[2], files[1], files[0], files[2]])) in refused(files[2], capsys)
    files[0].write_text('extends = "service.toml"\n', encoding="utf-8")
    assert f"extends: {files[0]} -> {files[0]} is a circle" in refused(files[0], capsys)


@pytest.mark.parametrize(
    ("base", "said"),
    [
        (None, "extends ../node/service.toml: extends ../base/service.toml: No such file or directory"),
        ("port = ", "extends ../base/service.toml: Invalid value (at end of document)"),
        ('model = "m"\nprot = 1\n', "launch: prot: there is no such field; did you mean port?"),
        ("extends = 3\n", "extends: must be the path of a TOML file (got 3)"),
    ],
)
def test_an_error_in_a_base_names_the_chain_of_files_that_leads_to_it(files, base, said, capsys):
    files[0].unlink()
    if base is not None:
        files[0].write_text(base, encoding="utf-8")
    assert said in refused(files[2], capsys)
