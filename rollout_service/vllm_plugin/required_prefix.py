"""Required prefix: a chat prompt that begins with exactly the tokens of the turns before, as they were sampled.

vLLM's chat routes get the conversation as text, and tokenise it again. The tokens can then differ from those that the
policy sampled, and training would take them for the policy's. A request says what the prompt must begin with:

- `required_prefix_token_ids`: the prompt's tokens of an earlier turn, and those that it sampled;
- or, as NeMo-Gym sends them back, `prompt_token_ids` and `generation_token_ids` in the last assistant message that has
  them.

What the chat template writes after these turns follows: `rest_by_text`, `rest_by_turns`. If neither finds it, the
request is refused.
"""

from collections.abc import Callable, Sequence, Set
from typing import Any

from rollout_service.vllm_plugin.patch import Patch

NAME = "vllm.renderers.online_renderer.OnlineRenderer.preprocess_chat"
FIELD = "required_prefix_token_ids"
PROMPT, SAMPLED = "prompt_token_ids", "generation_token_ids"


def rest_by_text(
    prefix: list[int],
    rendered: list[int],
    ends: Set[int],
    decode: Callable[[list[int]], str],
    encode: Callable[[str], list[int]],
) -> list[int] | None:
    """What follows `prefix` if the text of the conversation begins with the prefix's text: the rest of it, tokenised by
    itself. A template may leave out the token that ended the last turn. None if the texts differ.

    `rendered`: the template's tokens of the conversation. `ends`: tokens that end a turn."""
    if rendered[: len(prefix)] == prefix:
        return rendered[len(prefix) :]
    text = decode(rendered)
    for known in (prefix, prefix[:-1] if prefix[-1] in ends else prefix):
        if text.startswith(begins := decode(known)):
            return encode(text[len(begins) :])
    return None


def rest_by_turns(prefix: list[int], rendered: list[int], earlier: Sequence[int], ends: Set[int]) -> list[int] | None:
    """What follows `prefix` if it has the turns of the conversation in other words, as where a template leaves out the
    reasoning of earlier turns: what `rendered` has after as many turns. None if it has more or fewer turns.

    `earlier`: the template's tokens of the messages up to the last one of the assistant. If the last turn was cut, so
    that `prefix` does not end with the end of a turn, the template's end follows.

    Example, where 9 ends a turn: `[1, 9, 2, 3, 9]`, `[1, 9, 4, 9, 5]`, `[1, 9, 4, 9]` give `[5]`.
    """
    cut = prefix[-1] not in ends
    places = [i for i, token in enumerate(rendered) if token in ends]
    turns = sum(token in ends for token in earlier)
    if turns == 0 or len(places) < turns or sum(token in ends for token in prefix) != turns - cut:
        return None
    return rendered[places[turns - 1] + (0 if cut else 1) :]


def required_prefix(request: Any, messages: Sequence[Any]) -> Any:
    """What the request says that its prompt must begin with; None if it says nothing."""
    if (given := getattr(request, FIELD, None)) is not None:
        return given
    for message in reversed(messages):
        if message.get(PROMPT) is not None and message.get(SAMPLED) is not None:
            parts = [message[PROMPT], message[SAMPLED]]
            return [*parts[0], *parts[1]] if all(isinstance(part, list) for part in parts) else parts
    return None


def require_prefix(online_renderer: Any, ends: Set[int]) -> None:
    """From now on this renderer's chat prompts begin with what their requests require."""
    from vllm.exceptions import VLLMValidationError

    stock, renderer = online_renderer.preprocess_chat, online_renderer.renderer
    harmony = online_renderer._make_request_with_harmony

    def refused(message: str) -> VLLMValidationError:
        return VLLMValidationError(f"{FIELD}: {message}", parameter=FIELD)

    async def preprocess_chat(request: Any, messages: list[Any], *arguments: Any, **more: Any) -> Any:
        conversation, inputs = await stock(request, messages, *arguments, **more)
        prefix = required_prefix(request, messages)
        if prefix is None:
            return conversation, inputs
        if not isinstance(prefix, list) or not prefix or any(type(i) is not int or i < 0 for i in prefix):
            raise refused("give a list of token ids, at least one")
        renderer.validate_token_ids(prefix, parameter=FIELD)
        (prompt,) = inputs
        if prompt["type"] != "token":
            raise refused("images and other media cannot be combined with it; send text only")
        tokenizer, rendered = renderer.get_tokenizer(), prompt["prompt_token_ids"]

        def decode(ids: list[int]) -> str:
            return tokenizer.decode(ids, skip_special_tokens=False)

        rest = rest_by_text(
            prefix, rendered, ends, decode, lambda text: tokenizer.encode(text, add_special_tokens=False)
        )
        last = max((i for i, message in enumerate(messages) if message.get("role") == "assistant"), default=None)
        if rest is None and last is not None:
            whole = request.model_copy(update={"add_generation_prompt": False, "continue_final_message": False})
            _, (earlier,) = await stock(whole, messages[: last + 1], *arguments, **more | {"parser": None})
            rest = rest_by_turns(prefix, rendered, earlier["prompt_token_ids"], ends)
        if rest is None:
            raise refused(
                "the chat template's rendering of the messages does not continue these tokens: its turns are others. "
                "Send the messages that the tokens belong to, or leave the field out to start anew"
            )
        ids = prefix + rest
        return conversation, [prompt | {"prompt_token_ids": ids, "prompt": decode(ids)}]

    def _make_request_with_harmony(request: Any, *arguments: Any, **more: Any) -> Any:
        if required_prefix(request, request.messages) is not None:
            raise refused(
                "this policy's chat format (Harmony) cannot be continued from tokens; use token ids throughout"
            )
        return harmony(request, *arguments, **more)

    online_renderer._make_request_with_harmony = _make_request_with_harmony
    online_renderer.preprocess_chat = preprocess_chat


REQUIRED_PREFIX = Patch(
    NAME,
    "it tokenises the turns before again, and ignores required_prefix_token_ids, which NeMo-Gym sends",
    when="on the renderer's own object, on every device, once vLLM's routes are used",
    unneeded="vLLM's chat routes take required_prefix_token_ids",
    apply=require_prefix,
    shown_by="tests/integration/test_generate.py::test_a_chat_prompt_begins_with_the_tokens_of_the_turns_before",
    relies_on={NAME: "self, request, messages, ..."},
)
