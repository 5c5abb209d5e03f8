"""Prompts of a measurement: a file of JSON lines, as token ids."""

import json
from pathlib import Path

from rollout_service.checkpoint_files import resolve_model


def read_prompts(model: str, file: Path) -> list[list[int]]:
    """Of a file of JSON lines with `prompt` or `prompt_token_ids`. Raises ValueError when it is empty."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve_model(model))
    lines = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"prompts: {file} is empty")
    return [line.get("prompt_token_ids") or tokenizer.encode(line["prompt"]) for line in lines]
