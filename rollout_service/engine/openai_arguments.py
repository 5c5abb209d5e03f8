"""The section `[openai]` of the configuration, as the arguments of vLLM's own OpenAI-compatible application."""

import json
from argparse import Namespace
from typing import Any

from rollout_service.config import OpenAIConfig


def openai_arguments(section: OpenAIConfig) -> Namespace:
    """What `vllm serve` would have parsed, for `build_app` and `init_app_state`."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    flags = ["--generation-config", "vllm", "--enable-scale-out"]
    if section.auto_tool_choice:
        flags += ["--enable-auto-tool-choice", "--tool-call-parser", str(section.tool_parser)]
    if section.chat_template_kwargs:
        flags += ["--default-chat-template-kwargs", json.dumps(section.chat_template_kwargs)]
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(flags)
    arguments.chat_template = section.chat_template  # the template itself, which vLLM takes as well as a path
    if section.reasoning_parser is not None:  # where vLLM's own start puts its flag
        arguments.structured_outputs_config.reasoning_parser = section.reasoning_parser
    return arguments


def check_parsers(section: OpenAIConfig, name: str, tokenizer: Any) -> None:
    """Raises ValueError when the parsers do not fit the tokenizer of the policy `name`, such as one that lacks the
    tokens that a parser looks for. Else the first chat would find out."""
    chosen = {"openai.tool_parser": section.tool_parser, "openai.reasoning_parser": section.reasoning_parser}
    if not any(chosen.values()):
        return
    from vllm.parser.parser_manager import ParserManager

    try:
        ParserManager.get_parser(
            tool_parser_name=section.tool_parser,
            reasoning_parser_name=section.reasoning_parser,
            enable_auto_tools=section.auto_tool_choice,
            model_name=name,
            tokenizer=tokenizer,
        )
    except (TypeError, ValueError) as error:
        fields = ", ".join(field for field, parser in chosen.items() if parser)
        raise ValueError(f"{fields}: vLLM cannot parse this policy's text so: {error}") from error
