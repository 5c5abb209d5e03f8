"""vLLM's own routes between tokens and tokens, as trainers call them: generate, render, tokenize, required prefixes."""

import json

import pytest
from over_http import PROMPT

GENERATE = "/inference/v1/generate"
LIMIT = 512 - (3 + 1)
"""tokens of prompt and response together, with three drafts"""


def posted(client, path, body, **headers):
    response = client.http.post(path, json=body, headers=headers)
    assert response.status_code == 200, response.text
    return response.json()


def refused(client, path, body):
    """(status, the field that the error names, its message)"""
    response = client.http.post(path, json=body)
    error = response.json()["error"]
    assert error["code"] == response.status_code
    return response.status_code, error["param"], error["message"]


def events(client, path, body):
    text = client.http.post(path, json=body | {"stream": True}).text
    *events, last = [event.removeprefix("data: ") for event in text.split("\n\n") if event]
    assert last == "[DONE]"
    return [json.loads(event) for event in events]


@pytest.fixture
def ids(client):
    return posted(client, "/tokenize", {"prompt": PROMPT})["tokens"]


def renderers_body(ids, **params):
    """As verifiers' renderers send it."""
    given = {"temperature": 0.7, "max_tokens": 12, "stop_token_ids": [1], "logprobs": 1, "skip_special_tokens": False}
    return {
        "model": "demo-policy", "token_ids": ids, "sampling_params": given | params, "cache_salt": "step 3",
        "priority": 0, "features": None,
    }  # fmt: skip


def test_each_token_of_generate_has_both_names_streamed_or_not(client, ids):
    for logprobs, listed in ((0, 1), (1, 1), (3, 3)):
        body = renderers_body(ids, logprobs=logprobs, ignore_eos=True, stop_token_ids=[])
        (choice,) = posted(client, GENERATE, body, **{"X-Session-ID": "s1"})["choices"]
        parts = [part for event in events(client, GENERATE, body) for part in event["choices"]]
        assert choice["finish_reason"] == parts[-1]["finish_reason"] == "length"
        for pieces in ([choice], parts):
            tokens = [token for piece in pieces for token in piece["token_ids"]]
            content = [entry for piece in pieces for entry in piece["logprobs"]["content"]]
            assert len(tokens) == 12
            assert [entry["token_id"] for entry in content] == tokens
            for entry in content:
                assert listed <= len(entry["top_logprobs"]) <= listed + 1
                for token in (entry, *entry["top_logprobs"]):
                    assert token["token"] == f"token_id:{token['token_id']}"
                    assert token["logprob"] <= 0.0


def test_generates_log_probabilities_are_those_of_the_distribution_that_was_sampled_from(client, ids):
    """With top_k 1 that is certain."""
    body = renderers_body(ids, top_k=1)
    (choice,) = posted(client, GENERATE, body)["choices"]
    assert {entry["logprob"] for entry in choice["logprobs"]["content"]} == {0.0}


def test_text_and_stop_strings_are_there_when_they_are_asked_for(client, ids):
    body = renderers_body(ids, temperature=0.0) | {"output_mode": "text"}
    (choice,) = posted(client, GENERATE, body)["choices"]
    assert choice["text"] == posted(client, "/detokenize", {"tokens": choice["token_ids"]})["prompt"].replace(
        "<eos>", ""
    )
    assert all(not entry["token"].startswith("token_id:") for entry in choice["logprobs"]["content"])
    stop = choice["text"][2:4]
    (stopped,) = posted(client, GENERATE, renderers_body(ids, temperature=0.0, stop=[stop]))["choices"]
    assert (stopped["stop_reason"], stopped["finish_reason"]) == (stop, "stop")
    assert len(stopped["token_ids"]) < len(choice["token_ids"])


@pytest.mark.parametrize(
    ("params", "more", "status", "param"),
    [
        ({"tempreature": 0.5}, {}, 400, "sampling_params.tempreature"),
        ({"min_p": 0.1}, {}, 400, "sampling_params.min_p"),
        ({"structured_outputs": {"regex": "a"}}, {}, 400, "sampling_params.structured_outputs"),
        ({"temperature": 0.001}, {}, 400, "sampling_params.temperature"),
        ({"n": 513}, {}, 400, "sampling_params.n"),
        ({"temperature": -1}, {}, 400, "temperature"),
        ({}, {"token_ids": [10] * LIMIT}, 400, "token_ids"),
        ({}, {"token_ids": [10**6]}, 400, None),
        ({}, {"token_ids": "text"}, 400, None),
        ({}, {"prompt": "a"}, 400, "prompt"),
        ({}, {"content_parts": [{"type": "image_url", "url": "http://127.0.0.1:1/a.png"}]}, 400, "content_parts"),
        ({}, {"model": "other"}, 404, "model"),
    ],
)
def test_a_wrong_request_to_generate_is_refused_in_openais_form(client, ids, params, more, status, param):
    found, field, message = refused(client, GENERATE, renderers_body(ids, **params) | more)
    assert found == status
    assert param is None or field == param, message


def test_a_response_ends_where_the_context_does(client):
    """As on vLLM's other routes: the positions that a drafter looks ahead stay free."""
    body = {"token_ids": [10] * (LIMIT - 20), "sampling_params": {"ignore_eos": True}}
    for more in ({}, {"max_tokens": 20}, {"max_tokens": 10**6}):
        asked = body | {"sampling_params": body["sampling_params"] | more}
        (choice,) = posted(client, GENERATE, asked)["choices"]
        assert (len(choice["token_ids"]), choice["finish_reason"]) == (20, "length")


def test_generates_defaults_are_the_services_and_are_echoed(client, ids):
    body = {"token_ids": ids, "sampling_params": {"n": 16, "top_k": 50}}
    response = client.http.post(GENERATE, json=body)
    assert json.loads(response.headers["x-sampling"]) == {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
    assert len({tuple(choice["token_ids"]) for choice in response.json()["choices"]}) > 1


def test_what_render_answers_is_a_body_for_generate(client):
    asked = {"model": "demo-policy", "max_tokens": 8, "temperature": 0.0, "return_token_ids": True}
    chat = asked | {"messages": [{"role": "user", "content": PROMPT.strip()}]}
    text = asked | {"prompt": [PROMPT, "1 + 1 =\n"]}
    whole = posted(client, "/v1/chat/completions", chat)
    rendered = posted(client, "/v1/chat/completions/render", chat)
    assert rendered["token_ids"] == whole["prompt_token_ids"]
    assert posted(client, GENERATE, rendered)["choices"][0]["token_ids"] == whole["choices"][0]["token_ids"]
    for body, choice in zip(
        posted(client, "/v1/completions/render", text), posted(client, "/v1/completions", text)["choices"], strict=True
    ):
        assert posted(client, GENERATE, body)["choices"][0]["token_ids"] == choice["token_ids"]
    assert "x-sampling" not in client.http.post("/v1/chat/completions/render", json=chat).headers


def test_tokenize_and_detokenize_are_inverse_and_take_chats(client, ids):
    assert posted(client, "/detokenize", {"tokens": ids}) == {"prompt": PROMPT}
    chat = {"messages": [{"role": "user", "content": PROMPT.strip()}], "chat_template_kwargs": {"a": 1}}
    assert posted(client, "/tokenize", chat)["tokens"] == ids
    assert refused(client, "/tokenize", {"promt": "a"})[:2] == (400, "promt")
    assert refused(client, "/detokenize", {"tokens": [-1]})[0] == 400


def gyms_body(messages, **more):
    """As NeMo-Gym's vLLM model sends it."""
    return {
        "model": "demo-policy", "messages": messages, "temperature": 1.0, "max_tokens": 12, "logprobs": True,
        "top_logprobs": 0, "return_tokens_as_token_ids": True, "chat_template_kwargs": {"enable_thinking": False},
        "metadata": {"a": "b"}, **more,
    }  # fmt: skip


def test_nemo_gyms_first_turn_has_token_ids_by_both_of_its_ways(client):
    messages = [{"role": "user", "content": PROMPT.strip()}]
    answer = posted(client, "/v1/chat/completions", gyms_body(messages, return_token_ids=True))
    (choice,) = answer["choices"]
    named = [entry["token"] for entry in choice["logprobs"]["content"]]
    assert named == [f"token_id:{token}" for token in choice["token_ids"]]
    asked = {"model": "demo-policy", "messages": messages, "chat_template_kwargs": {"enable_thinking": False}}
    assert posted(client, "/tokenize", asked)["tokens"] == answer["prompt_token_ids"]


@pytest.mark.parametrize("ended", [False, True])
def test_a_chat_prompt_begins_with_the_tokens_of_the_turns_before(client, ids, ended):
    """The answer is of tokens that the tokenizer would not make of its text."""
    sampled = [*posted(client, "/tokenize", {"prompt": "1"})["tokens"] * 4, *([1] if ended else [])]
    text = posted(client, "/detokenize", {"tokens": sampled})["prompt"].replace("<eos>", "")
    messages = [
        {"role": "user", "content": PROMPT.strip()},
        {"role": "assistant", "content": text},
        {"role": "user", "content": "And 1 + 1 ="},
    ]
    bundle = {"prompt_token_ids": ids, "generation_token_ids": sampled, "generation_log_probs": [-1.0] * len(sampled)}
    sent_back = [messages[0], messages[1] | bundle, messages[2]]
    following = posted(client, "/tokenize", {"prompt": "\nAnd 1 + 1 =\n"})["tokens"]
    ways = (gyms_body(messages, required_prefix_token_ids=ids + sampled), gyms_body(sent_back))
    for body in ways:
        answer = posted(client, "/v1/chat/completions", body | {"return_token_ids": True})
        assert answer["prompt_token_ids"] == ids + sampled + following
        fields = ("model", "messages", "required_prefix_token_ids")
        asked = {name: body[name] for name in fields if name in body}
        assert posted(client, "/tokenize", asked)["tokens"] == answer["prompt_token_ids"]
        assert posted(client, "/v1/chat/completions/render", body)["token_ids"] == answer["prompt_token_ids"]


def test_a_chat_that_does_not_continue_the_required_prefix_is_refused(client, ids):
    messages = [{"role": "user", "content": "another prompt"}]
    for path in ("/v1/chat/completions", "/tokenize", "/v1/chat/completions/render"):
        body = {"model": "demo-policy", "messages": messages, "required_prefix_token_ids": ids}
        status, field, message = refused(client, path, body)
        assert (status, field) == (400, "required_prefix_token_ids")
        assert "does not continue these tokens" in message
        assert refused(client, path, body | {"required_prefix_token_ids": [-1]})[0] == 400
        assert refused(client, path, body | {"required_prefix_token_ids": [10**6]})[0] == 400
    assert refused(client, "/v1/completions", {"prompt": "a", "required_prefix_token_ids": [1]})[0] == 400
