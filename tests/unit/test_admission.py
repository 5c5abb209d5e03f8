"""Admission refuses bad requests before anything is generated, and names the field."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from rl_loop.config import SamplingConfig
from rollout_service.cli import main
from rollout_service.evaluation.audit_config import AuditConfig
from rollout_service.evaluation.calibrate_config import CalibrateConfig
from rollout_service.evaluation.compare_config import CompareConfig
from rollout_service.http.admission import Admission, Refused
from rollout_service.http.openai_requests import BodyFields, body_fields
from rollout_service.lossless import NOT_LOSSLESS, described, not_lossless
from rollout_service.protocol import GroupRequest, RolloutRequest, Sampling, SharedMemoryPush


class Characters:
    """A tokenizer with one token per character."""

    def encode(self, text, add_special_tokens=True):
        return [ord(c) for c in text]

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return "".join(f"{m['role']}:{m['content']}\n" for m in messages)


@pytest.fixture
def admission():
    return Admission("demo", Characters(), vocab_size=128, context_limit=60, drafting=True, openai_fields={})


def refusal(admission, **group):
    with pytest.raises(Refused) as refused:
        admission.admit(RolloutRequest(groups=[GroupRequest(prompt="ok", sampling=Sampling(max_tokens=4)),
                                               GroupRequest(**group)]))  # fmt: skip
    return {problem.field: problem.message for problem in refused.value.problems}


def test_text_ids_and_messages_all_become_token_ids(admission):
    s = Sampling(max_tokens=4)
    groups = admission.admit(
        RolloutRequest(groups=[
            GroupRequest(prompt="ab", sampling=s),
            GroupRequest(id="mine", prompt_token_ids=[97, 98], sampling=s),
            GroupRequest(messages=[{"role": "u", "content": "a"}], sampling=s),
        ])
    )  # fmt: skip
    assert [g.prompt_token_ids for g in groups] == [[97, 98], [97, 98], [117, 58, 97, 10]]
    assert [g.id for g in groups] == ["0", "mine", "2"]


def test_a_too_long_prompt_a_too_long_response_and_an_unknown_token_are_named(admission):
    assert "60" in refusal(admission, prompt="x" * 61, sampling=Sampling(max_tokens=1))["groups.1.prompt"]
    too_long = refusal(admission, prompt="xy", sampling=Sampling(max_tokens=59))
    assert "1 to 58" in too_long["groups.1.sampling.max_tokens"]
    assert (
        "vocabulary"
        in refusal(admission, prompt_token_ids=[128], sampling=Sampling(max_tokens=1))["groups.1.prompt_token_ids"]
    )
    assert refusal(admission, prompt="", sampling=Sampling(max_tokens=1)).keys() == {"groups.1.prompt"}
    assert refusal(admission, prompt="a", sampling=Sampling(max_tokens=2, min_tokens=3)).keys() == {
        "groups.1.sampling.min_tokens"
    }


def test_an_unknown_model_is_a_404(admission):
    with pytest.raises(Refused) as refused:
        admission.admit(RolloutRequest(groups=[GroupRequest(prompt="a")], model="other"))
    assert refused.value.status == 404


def body_with(field, value):
    """The field's value where its name says; `*` is the only entry of a list."""
    for part in reversed(field.split(".")):
        value = [value] if part == "*" else {part: value}
    return value


REFUSED = [pytest.param(entry, field, id=field) for entry in NOT_LOSSLESS for field in entry.fields]


@pytest.mark.parametrize(("entry", "field"), REFUSED)
def test_what_speculation_cannot_keep_lossless_is_refused_only_with_a_drafter(entry, field):
    def refused_by(**service):
        service = {"drafting": True, "on_cpu": True} | service
        fields = {"/v1/completions": BodyFields({"prompt", field.split(".")[0]})}
        body = body_with(field, {"type": "json_object"} if field != "min_p" else 0.1)
        try:
            Admission("demo", Characters(), 128, 64, openai_fields=fields, **service).check_openai(
                "/v1/completions", {"prompt": "a", **body}
            )
        except Refused as refused:
            (problem,) = refused.problems
            assert problem.field == field.replace("*", "0")
            assert f"because {entry.reason}; {entry.instead}, or serve without a drafter" in problem.message
            return True
        return False

    assert refused_by()
    assert refused_by(on_cpu=False) == entry.on_gpu
    assert not refused_by(drafting=False)
    for value in entry.asks_nothing:
        assert not list(not_lossless(body_with(field, value), "openai"))


def test_a_field_of_chats_is_refused_beside_a_prompt():
    schema = {
        "$defs": {
            "Prompt": {"properties": {"model": {}, "prompt": {}}},
            "Chat": {"properties": {"model": {}, "messages": {}, "tools": {}}},
        },
        "anyOf": [{"$ref": "#/components/schemas/vllm.Prompt"}, {"$ref": "#/components/schemas/vllm.Chat"}],
        "properties": {"model": {}, "prompt": {}, "messages": {}, "tools": {}, "required_prefix_token_ids": {}},
    }
    fields = {"/tokenize": body_fields(schema)}
    admission = Admission("demo", Characters(), 128, 64, drafting=True, openai_fields=fields)
    for field, value in {"messages": [], "tools": [], "required_prefix_token_ids": [1]}.items():
        with pytest.raises(Refused) as refused:
            admission.check_openai("/tokenize", {"prompt": "a", field: value})
        assert [problem.field for problem in refused.value.problems] == [field]
    admission.check_openai("/tokenize", {"prompt": "a", "model": "demo"})
    admission.check_openai("/tokenize", {"messages": [], "tools": [], "required_prefix_token_ids": [1]})


@pytest.mark.parametrize(("entry", "field"), REFUSED)
def test_a_rollout_request_cannot_have_fields_that_speculation_cannot_keep_lossless(entry, field):
    with pytest.raises(ValidationError) as wrong:
        Sampling.model_validate({field: None})
    if entry.on_rollouts:
        assert f"{field} is not offered, because {entry.reason}; {entry.instead}" in str(wrong.value)


def test_the_page_of_losslessness_names_what_is_refused_on_which_route():
    page = Path(__file__).resolve().parents[2] / "docs" / "losslessness.md"
    rows = [line.split("|")[1:4] for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    for entry in NOT_LOSSLESS:
        ((_, rollouts, openai),) = [row for row in rows if all(f"`{field}`" in row[0] for field in entry.fields)]
        assert ("always refused" in rollouts) == entry.on_rollouts
        assert "refused with a drafter" in openai
        assert ("on a CPU" in openai) == (not entry.on_gpu)


def test_help_says_what_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["rollout-service", "launch", "--help"])
    with pytest.raises(SystemExit):
        main()
    assert described() in capsys.readouterr().out


@pytest.mark.parametrize(
    "group",
    [
        {"prompt": "a", "prompt_token_ids": [1]},
        {},
        {"prompt": "a", "n": 0},
        {"prompt": "a", "sampling": {"temperature": -1}},
        {"prompt": "a", "sampling": {"min_p": 0.1}},
        {"prompt": "a", "smapling": {}},
    ],
)
def test_the_wire_types_refuse_what_they_do_not_know(group):
    with pytest.raises(ValidationError):
        GroupRequest.model_validate(group)


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin"])
def test_a_shared_memory_push_can_only_name_a_file_in_the_folder(file):
    with pytest.raises(ValidationError):
        SharedMemoryPush(file=file)


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", 0.005), ("temperature", 5.0), ("top_p", float("nan")), ("top_k", 2**31)]
)
def test_sampling_settings_that_the_engine_would_not_follow_are_refused_everywhere(field, value, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n', encoding="utf-8")
    for make in (
        lambda: Sampling(**{field: value}),
        lambda: SamplingConfig(**{field: value}),
        lambda: CompareConfig(model="m", prompts=prompts, **{field: value}),
        lambda: AuditConfig(model="m", **{field: [value]}),
    ):
        with pytest.raises(ValidationError, match=field):
            make()


@pytest.mark.parametrize("temperature", [0.005, 5.0])
def test_a_calibration_refuses_a_temperature_that_it_would_not_sample_at(temperature, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n', encoding="utf-8")
    with pytest.raises(ValidationError, match="temperature"):
        CalibrateConfig(model="m", prompts=prompts, drafter={"kind": "mtp"}, temperature=temperature)
