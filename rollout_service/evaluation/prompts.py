"""Prompts of a measurement: a file of JSON lines, as token ids."""

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from drafters.files.model_folder import resolve_model
from drafters.files.text_lines import json_lines
from rollout_service.protocol import Message

MESSAGES = TypeAdapter(list[Message])


def read_prompts(model: str, file: Path) -> list[list[int]]:
    """The prompts in a file of JSON lines with `prompt`, `messages` (through the policy's chat template) or
    `prompt_token_ids`. Raises ValueError when the file is empty, and, naming the line, when a line has none of them."""
    from transformers import AutoTokenizer

    import drafters.latent_moe  # noqa: F401

    tokenizer = AutoTokenizer.from_pretrained(resolve_model(model))

    def token_ids(line: Any) -> list[int]:
        match line:
            case {"prompt_token_ids": [_, *_] as ids} if all(type(token) is int for token in ids):
                return ids
            case {"prompt": str(prompt)} if ids := tokenizer.encode(prompt):
                return ids
            case {"messages": messages}:
                return chat_token_ids(tokenizer, MESSAGES.validate_python(messages))
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


def chat_token_ids(tokenizer: Any, messages: list[Message]) -> list[int]:
    """The token ids that the service, too, makes of a request's messages."""
    try:
        text = tokenizer.apply_chat_template(
            [message.model_dump() for message in messages], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a chat template is code of the checkpoint, and raises for what it refuses
        raise ValueError(f"the chat template refuses `messages`: {error}") from error
    return tokenizer.encode(text, add_special_tokens=False)
