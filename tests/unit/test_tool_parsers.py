"""The section [openai]: vLLM's parsers, their names checked before anything starts, and what they make of text."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from drafters.settings import read_command_line
from rollout_service.config import OpenAIConfig, ServiceConfig
from rollout_service.engine.openai_arguments import check_parsers, openai_arguments
from rollout_service.http.admission import Admission
from rollout_service.http.app import load_tokenizer
from rollout_service.protocol import GroupRequest, RolloutRequest, Sampling
from rollout_service.vllm_parsers import known_parsers
from rollout_service.vllm_plugin.grammars import refuse_grammars

POLICY = Path(__file__).resolve().parents[2] / "deploy" / "demo" / "models" / "policy"
TEMPLATE = "{% for m in messages %}[{{ m.content }}]{% endfor %}{{ 'thinking' if think else 'é\\n' }}"
HERMES = {"tool_parser": "hermes", "auto_tool_choice": True}


def said(capsys, *flags):
    with pytest.raises(SystemExit):
        read_command_line(ServiceConfig, "launch", ["--model", "m", *flags])
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--openai.tool_parser", "hermse"],
            "openai.tool_parser: vLLM has no parser of this name; did you mean hermes",
        ),
        (["--openai.reasoning_parser", "qwn3"], "openai.reasoning_parser: vLLM has no parser of this name"),
        (["--openai.auto_tool_choice", "true"], "openai.auto_tool_choice: needs a tool_parser"),
        (["--openai.tool_parser", "hermes"], "openai.tool_parser: has no effect with auto_tool_choice = false"),
        (["--openai.chat_template", "/none.jinja"], "openai.chat_template: /none.jinja: cannot be read"),
        (["--openai.chat_template", __file__[:-3]], "cannot be read"),
        (
            ["--engine.vllm", '{"reasoning_parser": "qwen3"}'],
            "engine.vllm.reasoning_parser: set openai.reasoning_parser",
        ),
    ],
)
def test_a_wrong_section_is_refused_before_anything_starts(capsys, flags, words):
    assert words in said(capsys, *flags)


def test_a_file_without_a_template_is_refused(capsys, tmp_path):
    (tmp_path / "plain").write_text("hello\n")
    assert "holds no Jinja template" in said(capsys, "--openai.chat_template", str(tmp_path / "plain"))


def test_an_engine_on_another_machine_gets_the_templates_text(tmp_path):
    (tmp_path / "template.jinja").write_text(TEMPLATE, encoding="utf-8")
    config = ServiceConfig(model="m", openai={"chat_template": str(tmp_path / "template.jinja"), **HERMES})
    told = ServiceConfig.model_validate(config.for_engine())
    assert told.openai == config.openai
    assert told.openai.chat_template == TEMPLATE


def test_messages_of_a_group_are_rendered_by_the_same_template():
    tokenizer = load_tokenizer(POLICY, TEMPLATE)
    admission = Admission("m", tokenizer, 10_000, 64, False, {}, chat_template_kwargs={"think": True})
    messages = [{"role": "user", "content": "1"}]
    (group,) = admission.admit(
        RolloutRequest(groups=[GroupRequest(messages=messages, sampling=Sampling(max_tokens=1))])
    )
    assert group.prompt_token_ids == tokenizer.encode("[1]thinking", add_special_tokens=False)


def test_a_request_with_a_grammar_does_not_reach_an_engine_that_drafts_on_a_cpu():
    from vllm.exceptions import VLLMValidationError

    asked = []
    llm = SimpleNamespace(generate=lambda prompt, params, *more: asked.append((prompt, params, more)))
    refuse_grammars(llm)
    plain = SimpleNamespace(structured_outputs=None)
    llm.generate("a", plain, "id")
    assert asked == [("a", plain, ("id",))]
    with pytest.raises(VLLMValidationError, match="sets a grammar for this request"):
        llm.generate("a", SimpleNamespace(structured_outputs=object()), "id")
    assert len(asked) == 1


# --- vLLM's own parsers ---


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(POLICY)


def test_the_names_are_those_that_vllm_registers():
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    assert known_parsers("tool_parser") == set(ToolParserManager.list_registered())
    assert known_parsers("reasoning_parser") == set(ReasoningParserManager.list_registered())


def test_the_section_becomes_vllms_own_arguments():
    section = OpenAIConfig(
        reasoning_parser="qwen3", chat_template=TEMPLATE, chat_template_kwargs={"think": False}, **HERMES
    )
    given, none = openai_arguments(section), openai_arguments(OpenAIConfig())
    assert (given.enable_auto_tool_choice, given.tool_call_parser) == (True, "hermes")
    assert given.structured_outputs_config.reasoning_parser == "qwen3"
    assert given.default_chat_template_kwargs == {"think": False}
    assert given.generation_config == none.generation_config == "vllm"
    assert given.tool_strict_level == "auto"  # a higher level sets a grammar for every request with tools
    assert (none.enable_auto_tool_choice, none.tool_call_parser, none.chat_template) == (False, None, None)
    assert none.structured_outputs_config.reasoning_parser == ""

    from vllm.renderers.chat_utils import load_chat_template

    assert load_chat_template(given.chat_template) == TEMPLATE


def parser(tokenizer, **section):
    from vllm.parser.parser_manager import ParserManager

    args = openai_arguments(OpenAIConfig(**section))
    reasoning = args.structured_outputs_config.reasoning_parser
    kind = ParserManager.get_parser(args.tool_call_parser, reasoning, args.enable_auto_tool_choice, tokenizer=tokenizer)
    return kind(tokenizer)


def chat(strict=None, **fields):
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    parameters = {"type": "object", "properties": {"a": {"type": "integer"}}}
    tool = {"type": "function", "function": {"name": "add", "parameters": parameters, "strict": strict}}
    return ChatCompletionRequest(messages=[{"role": "user", "content": "1"}], tools=[tool], **fields)


def test_a_tool_call_in_the_policys_text_becomes_a_call(tokenizer):
    text = 'Yes.<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    found = parser(tokenizer, **HERMES).extract_tool_calls(text, chat())
    assert [(call.function.name, call.function.arguments) for call in found.tool_calls] == [("add", '{"a": 1}')]
    assert found.content == "Yes."


def test_reasoning_in_the_policys_text_is_separated_from_the_answer(tokenizer):
    reasoning = parser(tokenizer, reasoning_parser="qwen3").extract_reasoning("<think>hm</think>\n\n42", chat())
    assert [part.strip() for part in reasoning] == ["hm", "42"]


@pytest.mark.parametrize(
    ("name", "request_of", "sets_grammar"),
    [
        ("hermes", {}, False),
        ("hermes", {"strict": False, "parallel_tool_calls": True}, False),
        ("hermes", {"strict": True}, True),
        ("hermes", {"parallel_tool_calls": False}, True),
        ("hermes", {"tool_choice": "required"}, True),
        ("qwen3_coder", {}, False),
        ("glm47", {}, True),
        ("glm47", {"tool_choice": "none"}, False),
    ],
)
def test_when_a_parser_of_vllm_sets_a_grammar(tokenizer, name, request_of, sets_grammar):
    """The list of refusals (lossless.py) names the fields that do it, and the engine refuses the rest."""
    adjusted = parser(tokenizer, tool_parser=name, auto_tool_choice=True).adjust_request(chat(**request_of))
    assert (adjusted.extract_structured_outputs() is not None) == sets_grammar


def test_a_parser_that_does_not_fit_the_policys_tokenizer_ends_the_start(tokenizer):
    check_parsers(OpenAIConfig(), "demo", tokenizer=None)
    check_parsers(OpenAIConfig(reasoning_parser="qwen3", **HERMES), "demo", tokenizer)
    with pytest.raises(ValueError, match=r"openai\.tool_parser: vLLM cannot parse this policy's text so: .*'demo'"):
        check_parsers(OpenAIConfig(tool_parser="mistral", auto_tool_choice=True), "demo", tokenizer)
