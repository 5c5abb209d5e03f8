"""Prompts of a measurement: a file of JSON lines, as token ids."""

from pathlib import Path
from typing import Any

from drafters.text_lines import json_lines
from rollout_service.checkpoint_files import resolve_model


def read_prompts(model: str, file: Path) -> list[list[int]]:
    """Of a file of JSON lines with `prompt` or `prompt_token_ids`. Raises ValueError when it is empty, or when a line
    has neither, naming the line."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve_model(model))

    def token_ids(line: Any) -> list[int]:
        match line:
            case {"prompt_token_ids": [_, *_] as ids}:
                return ids
            case {"prompt": str(prompt)}:
                return tokenizer.encode(prompt)
        raise ValueError("has neither a text `prompt` nor `prompt_token_ids`")

    try:
        prompts = list(json_lines(file, token_ids))
    except ValueError as error:
        raise ValueError(f"prompts: {error}") from error
    if not prompts:
        raise ValueError(f"prompts: {file} is empty")
    return prompts
