"""Chats with tools, on real engines that draft: answered, rendered by one template, and never under a grammar."""

import httpx
import pytest
from engines import launched

from rollout_service.client import RolloutClient
from rollout_service.protocol import GroupRequest, Sampling

DEMO = ("--config", "deploy/demo/service.toml", "--drafter.schedule", "fixed", "--openai.auto_tool_choice", "true")
TEMPLATE = "{% for m in messages %}{{ m.content }} {{ word }}{% endfor %}"
MESSAGES = [{"role": "user", "content": "1 + 1 ="}]
ADD = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
CHAT = {
    "model": "demo-policy", "messages": MESSAGES, "max_tokens": 5, "tools": [{"type": "function", "function": ADD}],
    "return_token_ids": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def with_hermes():
    """A service with parsers of tool calls and of reasoning, and with a chat template of its own."""
    section = ("--openai.tool_parser", "hermes", "--openai.reasoning_parser", "qwen3")
    template = ("--openai.chat_template", TEMPLATE, "--openai.chat_template_kwargs", '{"word": "2"}')
    with launched(*DEMO, *section, *template) as (url, _):
        yield url


@pytest.mark.parametrize("choice", [{}, {"tool_choice": "auto"}, {"tool_choice": "none"}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_with_tools_is_answered(with_hermes, choice, stream):
    answer = httpx.post(f"{with_hermes}/v1/chat/completions", json=CHAT | choice | {"stream": stream}, timeout=60)
    assert answer.status_code == 200
    assert '"error"' not in answer.text
    if not stream:
        assert 1 <= len(answer.json()["choices"][0]["token_ids"]) <= 5


def test_chats_and_groups_are_rendered_by_the_same_template(with_hermes):
    chat = httpx.post(f"{with_hermes}/v1/chat/completions", json=CHAT, timeout=60).json()
    with RolloutClient(with_hermes) as client:
        (group,) = client.rollouts([GroupRequest(messages=MESSAGES, sampling=Sampling(max_tokens=1))])
        (text,) = client.rollouts([GroupRequest(prompt="1 + 1 = 2", sampling=Sampling(max_tokens=1))])
    assert chat["prompt_token_ids"] == group.prompt_token_ids == text.prompt_token_ids


def test_an_engines_answer_has_the_requests_id(with_hermes):
    headers = {"X-Request-Id": "mine"}
    answer = httpx.post(f"{with_hermes}/v1/chat/completions", json=CHAT, headers=headers, timeout=60)
    assert answer.json()["id"] == "chatcmpl-mine"
    assert answer.headers.get_list("x-request-id") == ["mine"]


def test_what_a_parser_would_enforce_by_a_grammar_is_refused_by_name(with_hermes):
    strict = [{"type": "function", "function": ADD | {"strict": True}}]
    refused = {"parallel_tool_calls": {"parallel_tool_calls": False}, "tools.0.function.strict": {"tools": strict}}
    for field, more in refused.items():
        answer = httpx.post(f"{with_hermes}/v1/chat/completions", json=CHAT | more, timeout=60)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == field


def test_a_grammar_that_a_parser_sets_is_refused_beside_drafts():
    with launched(*DEMO, "--openai.tool_parser", "glm47") as (url, _):
        for stream in (False, True):
            answer = httpx.post(f"{url}/v1/chat/completions", json=CHAT | {"stream": stream}, timeout=60)
            assert answer.status_code == 400
            assert "sets a grammar for this request" in answer.json()["error"]["message"]
        assert httpx.post(f"{url}/v1/chat/completions", json=CHAT | {"tool_choice": "none"}).status_code == 200
