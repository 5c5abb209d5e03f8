"""What follows the tokens that a chat prompt must begin with, or that there is no telling."""

from types import SimpleNamespace

import pytest
from vllm.exceptions import VLLMValidationError

from rollout_service.vllm_plugin.required_prefix import require_prefix, required_prefix, rest_by_text, rest_by_turns

END = 0
"""ends a turn; the other tokens are letters, and 50 is "ab" in one token"""


def decode(ids):
    return "".join({END: "|", 50: "ab"}.get(i, chr(96 + i)) for i in ids)


def encode(text):
    """Letters only, as if the tokenizer had never heard of token 50."""
    return [END if c == "|" else ord(c) - 96 for c in text]


def by_text(prefix, conversation):
    return rest_by_text(prefix, encode(conversation), {END}, decode, encode)


@pytest.mark.parametrize(
    ("prefix", "conversation", "rest"),
    [
        ([3, END, 1, 2, END], "c|ab|d|", "d|"),  # the same tokens
        ([3, END, 50, END], "c|ab|d|", "d|"),  # the same text of other tokens
        ([3, END, 50], "c|ab|d|", "|d|"),  # a response that was cut
        ([3, END, 50, END], "c|abd|", "d|"),  # a template that does not write the end of the response
        ([3, END, 50, END], "c|ab|", ""),
        ([3, END, 50, END], "c|ac|d|", None),
        ([3, END, 50, END, 4, END], "c|ab|", None),
    ],
)
def test_the_rest_of_the_conversations_text_follows_its_beginning(prefix, conversation, rest):
    assert by_text(prefix, conversation) == (None if rest is None else encode(rest))


@pytest.mark.parametrize(
    ("prefix", "conversation", "earlier", "rest"),
    [
        ("a|think,b|", "a|b|c|", "a|think,b|", "c|"),  # the template leaves out the reasoning of earlier turns
        ("a|think,b", "a|b|c|", "a|b|", "|c|"),  # a response that was cut: the template ends it
        ("a|b|c|think,d|", "a|b|c|d|e|f", "a|b|c|d|", "e|f"),
        ("a|think,b|", "a|b|x|c|d|", "a|b|x|c|", None),  # the messages have a turn more
        ("a|b|x|think,c|", "a|c|d|", "a|c|", None),  # the messages have a turn less
        ("think,b", "bc", "b", None),  # a template that ends no turn
    ],
)
def test_after_as_many_turns_the_template_goes_on_whatever_words_they_have(prefix, conversation, earlier, rest):
    found = rest_by_turns(encode(prefix), encode(conversation), encode(earlier), {END})
    assert found == (None if rest is None else encode(rest))


def test_the_last_message_with_tokens_says_what_is_required_unless_the_request_does():
    bundle = {"prompt_token_ids": [1], "generation_token_ids": [2], "generation_log_probs": [-1.0]}
    later = bundle | {"prompt_token_ids": [1, 2, 3]}
    messages = [{"role": "user"}, bundle, {"role": "user"}, later, {"role": "user"}]
    assert required_prefix(SimpleNamespace(), messages) == [1, 2, 3, 2]
    assert required_prefix(SimpleNamespace(required_prefix_token_ids=[7]), messages) == [7]
    assert required_prefix(SimpleNamespace(required_prefix_token_ids=None), messages[:1]) is None
    assert required_prefix(SimpleNamespace(), [bundle | {"prompt_token_ids": 5}]) == [5, [2]]  # refused for its type


class Request(SimpleNamespace):
    def model_copy(self, update):
        return Request(**vars(self) | update)


class Renderer:
    """A chat template that leaves out the reasoning, before a comma, of all turns but the last."""

    def __init__(self):
        self.renderer, self._make_request_with_harmony = self, lambda request: "made"

    def get_tokenizer(self):
        return SimpleNamespace(
            decode=lambda ids, skip_special_tokens=True: decode(ids),
            encode=lambda text, add_special_tokens: encode(text),
        )

    def validate_token_ids(self, ids, parameter):
        if max(ids) > 50:
            raise VLLMValidationError("out of vocabulary", parameter=parameter)

    async def preprocess_chat(self, request, messages, parser=None):
        last = len(messages) - 1
        text = "".join(m["content"].split(",")[0 if i == last else -1] + "|" for i, m in enumerate(messages))
        return messages, [{"type": "token", "prompt_token_ids": encode(text), "prompt": text}]


MESSAGES = [
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "think,ab"},
    {"role": "user", "content": "d"},
]


@pytest.fixture
def renderer():
    renderer = Renderer()
    require_prefix(renderer, {END})
    return renderer


async def test_a_prompt_begins_with_exactly_the_required_tokens(renderer):
    for sampled in ([50, END], [20, 8, 9, 14, 11, 50, END], [20, 8, 9]):
        prefix = [3, END, *sampled]
        _, (prompt,) = await renderer.preprocess_chat(Request(required_prefix_token_ids=prefix), MESSAGES)
        rest = [4, END] if sampled[-1] == END else [END, 4, END]
        assert prompt["prompt_token_ids"] == prefix + rest
        assert prompt["prompt"] == decode(prefix + rest)


async def test_without_a_required_prefix_a_prompt_is_vllms_own(renderer):
    _, (prompt,) = await renderer.preprocess_chat(Request(), MESSAGES)
    assert prompt["prompt"] == "c|ab|d|"


@pytest.mark.parametrize(
    ("prefix", "messages", "words"),
    [
        ([3, END, 5, END, 50, END], MESSAGES, "does not continue these tokens"),
        ([5, END], MESSAGES[:1], "does not continue these tokens"),
        ([], MESSAGES, "at least one"),
        ("ab", MESSAGES, "list of token ids"),
        ([True], MESSAGES, "list of token ids"),
        ([51], MESSAGES, "out of vocabulary"),
    ],
)
async def test_what_cannot_be_continued_is_refused_by_name(renderer, prefix, messages, words):
    with pytest.raises(VLLMValidationError, match=words) as refused:
        await renderer.preprocess_chat(Request(required_prefix_token_ids=prefix), messages)
    assert refused.value.parameter == "required_prefix_token_ids"


def test_a_chat_format_that_cannot_be_continued_is_refused(renderer):
    assert renderer._make_request_with_harmony(Request(messages=MESSAGES)) == "made"
    with pytest.raises(VLLMValidationError, match="Harmony"):
        renderer._make_request_with_harmony(Request(messages=MESSAGES, required_prefix_token_ids=[1]))
