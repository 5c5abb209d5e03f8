"""`drafters train` and `drafters inspect` on toy models: data, resume, objectives, and errors that name the field."""

import json
import random

import pytest
import torch
from rl_toys import EOS, character_tokenizer, llama, qwen3_next
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from drafters.cli import main
from drafters.files.disk_space import NoRoom
from drafters.files.text_lines import json_lines
from drafters.learners.learner import OutputHead
from drafters.training import command
from drafters.training.command import train_drafter
from drafters.training.config import TrainDrafterConfig
from drafters.training.data import read_samples
from drafters.training.losses import DraftDistance, soft_cross_entropy, top_k_cross_entropy
from drafters.training.offline import split
from drafters.training.samples import Sample
from rollout_service.protocol import ErrorBody


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a policy of each architecture, and groups as the service writes them."""
    folder = tmp_path_factory.mktemp("drafters")
    for name, policy in (("llama", llama()), ("qwen3_next", qwen3_next())):
        policy.save_pretrained(folder / name)
        character_tokenizer().save_pretrained(folder / name)
    draw = random.Random(0)
    with (folder / "groups.jsonl").open("w") as lines:
        for number in range(40):
            completions = [
                {"index": i, "token_ids": [draw.randrange(6) + number % 3 for _ in range(9)] + [EOS]} for i in range(2)
            ]
            lines.write(json.dumps({"id": str(number), "prompt_token_ids": [number % 20, 1], "completions": completions,
                                    "engine": 0, "metadata": {}}) + "\n")  # fmt: skip
    return folder


SHAPES = {
    "eagle3": {"policy_layers": [0, 1, 2], "vocabulary_size": 10}, "mtp": {},
    "draft_model": {"hidden_size": 32, "layers": 1},
}  # fmt: skip


def config(folder, out, **changes) -> TrainDrafterConfig:
    fields = {
        "kind": "eagle3", "policy": str(folder / "llama"), "data": folder / "groups.jsonl", "out": out,
        "head": {} if "init" in changes else SHAPES[changes.get("kind", "eagle3")],
        "training": {"steps": 6, "batch_size": 8, "warmup": 1, "validate_every": 3}, "dtype": "float32",
        "validation": 0.2, "device": "cpu",
    }  # fmt: skip
    return TrainDrafterConfig.model_validate(fields | changes)


@pytest.mark.parametrize("kind", ["eagle3", "mtp", "draft_model"])
def test_a_drafter_of_every_kind_is_trained_and_validated_by_position(kind, folder, tmp_path):
    policy = "qwen3_next" if kind == "mtp" else "llama"
    train_drafter(config(folder, tmp_path / "out", kind=kind, policy=str(folder / policy)))
    records = tmp_path / "out" / "training"
    lines = list(json_lines(records / "acceptance.jsonl"))
    assert [line["step"] for line in lines] == [0, 3, 6]
    for line in lines:
        assert len(line["acceptance_by_position"]) == 3
        assert line["acceptance_length"] == pytest.approx(1 + sum(line["acceptance_by_position"]))
    assert lines[-1]["acceptance_length"] > lines[0]["acceptance_length"]
    assert (records / "acceptance.png").stat().st_size > 1000
    assert (tmp_path / "out" / "config.json").is_file()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == (2 if kind == "mtp" else 1)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(folder, tmp_path, monkeypatch):
    train_drafter(config(folder, tmp_path / "whole"))

    from drafters.training.offline import OfflineTrainer

    update = OfflineTrainer.update

    def interrupted(trainer):
        if trainer.step == 4:
            raise KeyboardInterrupt
        return update(trainer)

    monkeypatch.setattr(OfflineTrainer, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_drafter(config(folder, tmp_path / "cut"))
    monkeypatch.setattr(OfflineTrainer, "update", update)
    torch.rand(7)
    train_drafter(config(folder, tmp_path / "cut", resume=True))
    for file in ("model.safetensors", "training/state.safetensors", "training/acceptance.jsonl"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_resume_starts_where_there_is_nothing(folder, tmp_path):
    train_drafter(config(folder, tmp_path / "whole"))
    train_drafter(config(folder, tmp_path / "other", resume=True))
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "other")]
    assert written[0] == written[1]


def test_a_state_that_cannot_be_written_leaves_the_previous_one(folder, tmp_path, monkeypatch):
    write, written = command.save_file, []

    def interrupted(tensors, file):
        written.append(file)
        if len(written) > 1:
            file.write_bytes(b"half")
            raise OSError("no space left on device")
        write(tensors, file)

    monkeypatch.setattr(command, "save_file", interrupted)
    with pytest.raises(OSError, match="no space"):
        train_drafter(config(folder, tmp_path / "out", save_every=3))
    monkeypatch.setattr(command, "save_file", write)
    train_drafter(config(folder, tmp_path / "out", resume=True))
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("kind", "full"),
    [
        ("eagle3", "state.safetensors"),
        ("eagle3", "model.safetensors"),
        ("mtp", "mtp.safetensors"),
        ("draft_model", "model.safetensors"),
    ],
)
def test_a_full_disk_leaves_the_previous_drafter_and_says_the_room_needed(kind, full, folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    settings = {"kind": kind, "policy": str(folder / ("qwen3_next" if kind == "mtp" else "llama")), "save_every": 3}
    before = {}

    def second_has_no_room(tensors, file, **named):
        if not before and (out / "config.json").exists():
            before.update({path: path.read_bytes() for path in files(out)})
        if before and file.name.endswith(full):
            file.write_bytes(b"half")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_file(tensors, file, **named)

    with monkeypatch.context() as disk:
        for module in ("drafters.training.command", "drafters.learners.learner"):
            disk.setattr(f"{module}.save_file", second_has_no_room)
        with pytest.raises(NoRoom, match=r"state of step 6 and the drafter: it takes about [\d.]+ MiB, and .*out has"):
            train_drafter(config(folder, out, **settings))
    changed = {path.name for path in files(out) if path.read_bytes() != before.get(path)}
    assert changed <= {"acceptance.jsonl", "state.safetensors"} - {full}
    assert {path for path in files(out)} == before.keys(), "no half-written file is left"
    train_drafter(config(folder, out, resume=True, **settings))
    train_drafter(config(folder, tmp_path / "whole", **settings))
    for name in ("training/state.safetensors", "mtp.safetensors" if kind == "mtp" else "model.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_drafter_is_continued_from_a_checkpoint(folder, tmp_path):
    train_drafter(config(folder, tmp_path / "first"))
    train_drafter(config(folder, tmp_path / "second", init=str(tmp_path / "first")))
    began, ended = (
        list(json_lines(tmp_path / name / "training" / "acceptance.jsonl"))[line]
        for name, line in (("second", 0), ("first", -1))
    )
    assert began["acceptance_length"] == pytest.approx(ended["acceptance_length"], abs=1e-6)
    assert (
        load_file(tmp_path / "second/model.safetensors").keys()
        == load_file(tmp_path / "first/model.safetensors").keys()
    )


def test_errors_are_reported_before_training_and_name_the_field(folder, tmp_path, capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            main(["train", "--policy", str(folder / "llama"), "--data", str(folder / "groups.jsonl"),
                  "--out", str(tmp_path / "out"), "--device", "cpu", *arguments])  # fmt: skip
        return end.value.code, capsys.readouterr().err

    assert run("--kind", "mtp")[0] == 2
    for arguments, message in [
        (["--kind", "mtp"], "train eagle3 or draft_model"),
        (["--kind", "medusa"], "kind"),
        (["--kind", "eagle3", "--data", "missing.jsonl"], "data"),
        (["--kind", "eagle3", "--training.batch_size", "1000"], "training.batch_size"),
        (["--kind", "eagle3", "--head.policy_layers", "[1,9,2]"], "head.policy_layers"),
        (["--kind", "eagle3", "--out", str(folder / "llama")], "out"),
    ]:
        code, said = run(*arguments)
        assert (code, message in said) == (2, True), said


def test_inspect_says_what_a_folder_is(folder, tmp_path, capsys):
    train_drafter(config(folder, tmp_path / "eagle3"))
    for path, words in [(tmp_path / "eagle3", ["eagle3", "SpecForge", "[0, 1, 2]"]), (folder / "llama", ["Llama"])]:
        with pytest.raises(SystemExit) as end:
            main(["inspect", str(path)])
        assert end.value.code == 0
        said = capsys.readouterr().out
        assert all(word in said for word in words), said
    with pytest.raises(SystemExit) as end:
        main(["inspect", str(tmp_path)])
    assert end.value.code == 2


@pytest.mark.parametrize(
    ("line", "prompt", "response"),
    [
        ({"prompt_token_ids": [1, 2], "response_token_ids": [3, 4]}, [1, 2], [3, 4]),
        ({"prompt": "1+2", "response": "=3"}, "1+2", "=3<eos>"),
        ({"text": "12 34"}, "", "12 34"),
    ],
)
def test_rollouts_and_any_text_are_read(line, prompt, response, tmp_path):
    tokenizer = character_tokenizer()
    as_ids = lambda part: tokenizer.encode(part) if isinstance(part, str) else part  # noqa: E731
    (tmp_path / "data.jsonl").write_text(json.dumps(line) + "\n\n")
    (sample,) = read_samples(tmp_path / "data.jsonl", tokenizer, max_length=64)
    assert sample == Sample(as_ids(prompt), as_ids(response))


def test_plain_text_is_cut_into_samples_and_bad_lines_are_named(tmp_path):
    tokenizer: PreTrainedTokenizerFast = character_tokenizer()
    (tmp_path / "book.txt").write_text("1234567")
    samples = read_samples(tmp_path / "book.txt", tokenizer, max_length=3)
    assert [len(s.response) for s in samples] == [3, 3], "a remainder of one token teaches nothing"
    (tmp_path / "bad.jsonl").write_text('{"text": "12"}\n{"prompt": "12"}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl, line 2: .*'prompt'.*expected"):
        read_samples(tmp_path / "bad.jsonl", tokenizer, max_length=3)


def test_a_recording_of_a_run_with_failed_groups_is_training_data(tmp_path):
    """Recordings and rollout streams have an error line for each group that failed."""
    failure = ErrorBody(error="ValueError: the prompt is too long", group="b").model_dump_json()
    group = json.dumps({"prompt_token_ids": [1], "completions": [{"token_ids": [2, 3]}]})
    (tmp_path / "train-000001.jsonl").write_text(f"{group}\n{failure}\n")
    samples = read_samples(tmp_path / "train-000001.jsonl", character_tokenizer(), max_length=8)
    assert samples == [Sample([1], [2, 3])]


@pytest.mark.parametrize("name", ["messages", "prompt"])
def test_chats_are_read_by_the_chat_template_and_one_that_it_refuses_is_named(name, tmp_path):
    tokenizer = character_tokenizer()
    chat, answer = [{"role": "user", "content": "1+2"}], {"role": "assistant", "content": "=3"}
    line = {"messages": [*chat, answer]} if name == "messages" else {"prompt": chat, "response": "=3"}
    (tmp_path / "data.jsonl").write_text(json.dumps(line) + "\n")
    read = lambda: read_samples(tmp_path / "data.jsonl", tokenizer, max_length=64)  # noqa: E731
    with pytest.raises(ValueError, match=r"data\.jsonl, line 1: messages need a chat template"):
        read()
    tokenizer.chat_template = "{{ messages[0].content }}-"
    assert read() == [Sample(tokenizer.encode("1+2-"), tokenizer.encode("=3<eos>"))]
    tokenizer.chat_template = "{{ raise_exception('no chats here') }}"
    with pytest.raises(ValueError, match=r"line 1: the policy's chat template refuses the messages: no chats here"):
        read()


def test_held_out_samples_share_no_prompt_with_training():
    samples = [Sample([number // 4], [number, 1]) for number in range(40)]
    training, held_out = split(samples, 0.1)
    assert len(held_out) == 4
    assert {s.prompt[0] for s in training}.isdisjoint(s.prompt[0] for s in held_out)


def test_top_k_cross_entropy_by_hand_and_at_its_limit():
    p, q = torch.tensor([[0.6, 0.3, 0.1]]).log(), torch.tensor([[0.5, 0.3, 0.2]]).log()
    values, ids = p.topk(1)
    expected = -(0.6 * torch.tensor(0.5).log() + 0.4 * torch.tensor(0.5).log())
    torch.testing.assert_close(top_k_cross_entropy(values, ids, q), expected[None])
    values, ids = p.topk(3)
    torch.testing.assert_close(top_k_cross_entropy(values, ids, q), soft_cross_entropy(p, q), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("objective", ["soft_cross_entropy", "total_variation", "top_k"])
def test_chunks_change_neither_the_distance_nor_its_gradient(objective, monkeypatch):
    torch.manual_seed(0)
    policy, weight = OutputHead(torch.randn(7, 4), 7), torch.randn(7, 4, requires_grad=True)
    states, found = torch.randn(2, 5, 4), []
    for chunk in (1 << 20, 21):  # 21 logits: three rows of seven
        monkeypatch.setattr("drafters.training.losses.CHUNK", chunk)
        distance = DraftDistance(objective, top_k=3, temperature=0.7)
        targets = tuple(t.flatten(0, 1) for t in distance.targets(policy, states))
        value = distance(policy, targets, OutputHead(weight, 7), states.flatten(0, 1) * 0.5)
        found.append((value, torch.autograd.grad(value.sum(), weight)[0]))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("objective", ["soft_cross_entropy", "total_variation", "top_k"])
def test_every_objective_is_smallest_where_drafter_and_policy_agree_at_the_temperature(objective):
    torch.manual_seed(0)
    policy, states = OutputHead(torch.randn(7, 4), 7), torch.randn(9, 4)
    distance = DraftDistance(objective, top_k=3, temperature=0.5)
    targets = tuple(t[0] for t in distance.targets(policy, states[None]))
    own = distance(policy, targets, policy, states).mean()
    other = distance(policy, targets, OutputHead(policy.weight_VD * 0.5, 7), states).mean()
    assert own < other
