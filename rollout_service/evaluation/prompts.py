"""Prompts of a measurement: a file of JSON lines, as the token ids that the service, too, makes of them."""

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from drafters import prompts
from drafters.files.model_folder import resolve_model
from rollout_service.protocol import Message

MESSAGES = TypeAdapter(list[Message])


def read_prompts(model: str, file: Path) -> list[list[int]]:
    """The prompts in a file of JSON lines with `prompt`, `messages` (through the policy's chat template) or
    `prompt_token_ids`. Raises ValueError when the file is empty, and, naming the line, when a line has none of them."""
    from transformers import AutoTokenizer

    import drafters.latent_moe  # noqa: F401

    tokenizer = AutoTokenizer.from_pretrained(resolve_model(model))
    return prompts.read_prompts(
        tokenizer, file, lambda messages: chat_token_ids(tokenizer, MESSAGES.validate_python(messages))
    )


def chat_token_ids(tokenizer: Any, messages: list[Message]) -> list[int]:
    """The token ids that the service, too, makes of a request's messages."""
    try:
        text = tokenizer.apply_chat_template(
            [message.model_dump() for message in messages], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a chat template is code of the checkpoint, and raises for what it refuses
        raise ValueError(f"the chat template refuses `messages`: {error}") from error
    return tokenizer.encode(text, add_special_tokens=False)
