"""Prompts in a file of JSON lines, as token ids."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from drafters.files.text_lines import json_lines


def read_prompts(tokenizer: PreTrainedTokenizerBase, file: Path, chat: Callable[[Any], list[int]]) -> list[list[int]]:
    """The prompts in a file whose lines have `prompt`, `messages` (which `chat` turns into token ids) or
    `prompt_token_ids`.

    Raises ValueError when the file is empty, and, naming the line, when a line has none of them.
    """

    def token_ids(line: Any) -> list[int]:
        match line:
            case {"prompt_token_ids": [_, *_] as ids} if all(type(token) is int for token in ids):
                return ids
            case {"prompt": str(prompt)} if ids := tokenizer.encode(prompt):
                return ids
            case {"messages": messages}:
                return chat(messages)
            case {"prompt": list()}:
                raise ValueError("`prompt` is a list; give text, or name a list of messages `messages`")
        raise ValueError("has no prompt; give text as `prompt`, or `messages`, or token ids as `prompt_token_ids`")

    try:
        prompts = list(json_lines(file, token_ids))
    except ValueError as error:
        raise ValueError(f"prompts: {error}") from error
    if not prompts:
        raise ValueError(f"prompts: {file} is empty; give at least one prompt")
    return prompts
