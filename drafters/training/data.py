"""Training data of a drafter: JSON lines with groups, prompts and responses, chats or text, or a plain text file.

{"prompt_token_ids": [...], "completions": [{"token_ids": [...]}, ...], ...}    a Group of POST /v1/rollouts
{"prompt_token_ids": [...], "response_token_ids": [...]}
{"prompt": "...", "response": "..."}                                            the prompt may be a list of messages
{"messages": [..., {"role": "assistant", "content": "..."}]}                    the last message is the response
{"text": "..."}                                                                 all of the text is the response
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from drafters.chat import chat_text
from drafters.files.text_lines import json_lines, read_text
from drafters.training.samples import Sample

SHORTEST = 2
"""least number of tokens in a response: the policy gives the first token, and a draft begins after it"""


def read_samples(file: Path, tokenizer: PreTrainedTokenizerBase, *, max_length: int, most: int = 0) -> list[Sample]:
    """The file's samples in order, cut to `max_length` tokens; at most `most` samples (0: all).

    Raises ValueError, which names the file and the line and says what a line must hold.
    """
    found = []
    for sample in _of_file(file, tokenizer, max_length):
        cut = Sample(sample.prompt, sample.response[: max(0, max_length - len(sample.prompt))])
        if len(cut.response) >= SHORTEST:
            found.append(cut)
        if most and len(found) == most:
            break
    if not found:
        raise ValueError(f"data: {file} holds no response of {SHORTEST} or more tokens")
    return found


def _of_file(file: Path, tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[Sample]:
    try:
        if file.suffix == ".txt":
            yield from _of_text(read_text(file), tokenizer, length)
        else:
            for of_line in json_lines(file, lambda entry: list(_of_object(entry, tokenizer))):
                yield from of_line
    except ValueError as error:
        raise ValueError(f"data: {error}") from error


def _of_text(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[Sample]:
    ids = tokenizer.encode(text, add_special_tokens=False)
    for start in range(0, len(ids), length):
        yield Sample([], ids[start : start + length])


def _of_object(entry: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Iterator[Sample]:
    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    def ended(response: list[int]) -> list[int]:
        return response if tokenizer.eos_token_id is None else [*response, tokenizer.eos_token_id]

    match entry:
        case {"prompt_token_ids": [*prompt], "completions": [*completions]}:
            for completion in completions:
                if "token_ids" not in completion:
                    raise ValueError("a completion has no `token_ids`")
                yield Sample(prompt, completion["token_ids"])
        case {"error": str(), "group": str()}:  # a group that failed, as the service streams it: no sample
            return
        case {"prompt_token_ids": [*prompt], "response_token_ids": [*response]}:
            yield Sample(prompt, response)
        case {"prompt": str(prompt), "response": str(response)}:
            yield Sample(tokenizer.encode(prompt), ended(ids(response)))
        case {"messages": [*messages, {"role": "assistant", "content": str(response)}]}:
            yield Sample(ids(chat_text(tokenizer, messages)), ended(ids(response)))
        case {"prompt": [*messages], "response": str(response)}:
            yield Sample(ids(chat_text(tokenizer, messages)), ended(ids(response)))
        case {"text": str(text)}:
            yield Sample([], ids(text))
        case _:
            raise ValueError(
                f"has the keys {sorted(entry)}; expected prompt_token_ids with completions or response_token_ids, "
                "prompt with response, messages that end with the assistant's, or text"
            )
