"""Chat messages as the text that a policy reads, made by its tokenizer's chat template."""

from typing import Any

from transformers import PreTrainedTokenizerBase


def chat_text(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> str:
    """The text up to where the response begins.

    Raises ValueError when the tokenizer has no chat template, or when the template refuses the messages.
    """
    if tokenizer.chat_template is None:
        raise ValueError("messages need a chat template, and the policy's tokenizer has none; give the prompt as text")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is the checkpoint's own code; it raises to refuse messages
        said = " ".join(str(error).split())
        raise ValueError(f"the policy's chat template refuses the messages: {said}") from error
