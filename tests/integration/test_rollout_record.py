"""The rollout record in the answers of vLLM's own routes says what was sampled, by which weights, with which drafts."""

import json
import threading
from itertools import pairwise
from types import SimpleNamespace

import pytest
from engines import MODELS, wait_until
from over_http import PROMPT, policy_tensors, worst_difference

from rollout_service.protocol import GroupRequest, RolloutRecord, Sampling

ROUTES = "/v1/completions", "/v1/chat/completions", "/inference/v1/generate"


def body_of(path, prompt_token_ids, n=1, **sampling):
    """A request of the same prompt and sampling for each route."""
    body = {"model": "demo-policy", "return_rollout_record": True}
    if path == "/inference/v1/generate":
        return body | {"token_ids": prompt_token_ids, "sampling_params": {"n": n, **sampling}}
    prompt = {"messages": [{"role": "user", "content": PROMPT.strip()}]} if "chat" in path else {"prompt": PROMPT}
    return body | prompt | {"n": n, **sampling}


def choices_of(client, path, body, stream):
    """The choices of an answer, in order. Those of a stream have their last chunk, and the tokens of all chunks."""
    response = client.http.post(path, json=body | {"stream": stream})
    assert response.status_code == 200, response.text
    if not stream:
        return sorted(response.json()["choices"], key=lambda choice: choice["index"])
    choices = {}
    for event in response.text.split("\n\n"):
        data = event.removeprefix("data: ")
        for choice in json.loads(data)["choices"] if data and data != "[DONE]" else ():
            found = choices.setdefault(choice["index"], {"token_ids": []})
            assert "rollout_record" not in found, "a record comes with the last chunk"
            assert ("rollout_record" in choice) == (choice["finish_reason"] is not None)
            tokens = found["token_ids"] + (choice.get("token_ids") or [])
            found |= choice | {"token_ids": tokens}
    return [choices[i] for i in sorted(choices)]


def records_of(client, path, body, stream=False):
    return [RolloutRecord.model_validate(choice["rollout_record"]) for choice in choices_of(client, path, body, stream)]


def running(client):
    """The number of choices in the engines, from vLLM's gauges."""
    lines = client.http.get("/metrics").text.split("\n")
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:num_requests_running{"))


@pytest.fixture(scope="module")
def ids(client):
    return client.http.post("/tokenize", json={"prompt": PROMPT}).json()["tokens"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ROUTES)
def test_a_record_says_what_rollouts_say_for_the_same_seed(client, ids, path, stream):
    sampling = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "max_tokens": 40, "seed": 11}
    (group,) = client.rollouts([GroupRequest(prompt=PROMPT, n=3, sampling=Sampling(**sampling))])
    records = records_of(client, path, body_of(path, ids, n=3, **sampling), stream)
    for record, completion in zip(records, group.completions, strict=True):
        assert record.prompt_token_ids == group.prompt_token_ids
        assert record.token_ids == completion.token_ids
        assert record.logprobs == pytest.approx(completion.logprobs, abs=1e-5)
        assert record.weight_versions == completion.weight_versions
        speculation = record.speculation  # which drafts were made depends on what ran beside them
        assert (speculation.drafter, speculation.drafter_version) == ("mtp", completion.speculation.drafter_version)
        assert len(record.token_ids) <= 1 + speculation.draft_steps + speculation.accepted


@pytest.mark.parametrize("path", ROUTES)
def test_a_records_log_probabilities_equal_an_exact_recomputation(client, ids, path):
    sampling = {"temperature": 0.8, "top_k": 20, "top_p": 0.9}
    asked = {
        "/v1/completions": {"logprobs": 2},
        "/v1/chat/completions": {"logprobs": True, "top_logprobs": 2},
        "/inference/v1/generate": {},
    }[path]
    for more in ({}, asked):  # whether or not the request asks for log-probabilities
        body = body_of(path, ids, n=4, max_tokens=48, **sampling) | more
        if path == "/inference/v1/generate":
            body["sampling_params"] |= {"logprobs": 2, "prompt_logprobs": 1} if more else {}
        groups = [
            SimpleNamespace(prompt_token_ids=record.prompt_token_ids, completions=[record])
            for stream in ((False, True) if "prompt_logprobs" not in str(body) else (False,))
            for record in records_of(client, path, body, stream)
        ]
        assert worst_difference(groups, MODELS / "policy", **sampling) < 1e-4


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "more", [{}, {"echo": True}, {"stop": ["1", "2", "3"]}, {"logprobs": 0}, {"echo": True, "logprobs": 0}], ids=str
)
def test_each_choice_of_several_prompts_has_its_own_record(client, more, stream):
    prompts = [PROMPT, "1 + 1 =\n"]
    n = 1 if stream and len(more) == 2 else 2  # vLLM fails on a stream of several choices with the prompt's own
    body = {"model": "demo-policy", "prompt": prompts, "n": n, "max_tokens": 24, "return_token_ids": True}
    choices = choices_of(client, "/v1/completions", body | more | {"return_rollout_record": True}, stream)
    assert [choice["index"] for choice in choices] == list(range(2 * n))
    for i, choice in enumerate(choices):
        record = RolloutRecord.model_validate(choice["rollout_record"])
        tokens = client.http.post("/tokenize", json={"prompt": prompts[i // n]}).json()["tokens"]
        assert record.prompt_token_ids == tokens
        assert record.token_ids == choice["token_ids"]
        assert len(record.logprobs) == len(record.token_ids)
        assert [(span.start, span.end) for span in record.weight_versions] == [(0, len(record.token_ids))]


def test_the_spans_of_a_record_tell_which_version_sampled_what_across_a_push(client, ids):
    version = client.weights().policy.version + 1
    found = {}

    def generate(path, stream):
        body = body_of(path, ids, n=2, max_tokens=440, ignore_eos=True)
        found[path, stream] = records_of(client, path, body, stream)

    threads = [threading.Thread(target=generate, args=(path, stream)) for path in ROUTES for stream in (False, True)]
    for thread in threads:
        thread.start()
    wait_until(lambda: running(client) == 12, 30, "all choices are running")
    client.push_weights("policy", policy_tensors(), version)
    for thread in threads:
        thread.join()
    assert len(found) == 6
    spans = [record.weight_versions for records in found.values() for record in records]
    assert any([span.version for span in of] == [version - 1, version] for of in spans)
    for of in spans:
        assert (of[0].start, of[-1].end) == (0, 440)
        assert all(a.end == b.start for a, b in pairwise(of))


@pytest.mark.parametrize("path", ROUTES)
def test_without_the_field_an_answer_is_vllms_own(client, ids, path):
    for body in (body_of(path, ids), body_of(path, ids) | {"return_rollout_record": False}):
        body = body if body["return_rollout_record"] is False else {k: v for k, v in body.items() if "record" not in k}
        (choice,) = choices_of(client, path, body, stream=False)
        assert "rollout_record" not in choice
        assert choice.get("logprobs") is None


def test_what_cannot_be_recorded_is_refused(client):
    body = {"model": "demo-policy", "prompt": "a"}
    for more in ({"return_rollout_record": "yes"}, {"return_rollout_record": True, "use_beam_search": True}):
        error = client.http.post("/v1/completions", json=body | more).json()["error"]
        assert (error["code"], error["param"]) == (400, "return_rollout_record")


@pytest.mark.parametrize("path", ROUTES)
def test_the_draft_steps_of_records_are_those_that_the_service_counts(client, ids, path):
    def counted():
        (mtp,) = client.speculation().drafters
        by_context = mtp.by_context_length
        return (
            mtp.draft_steps,
            mtp.accepted,
            sum(c.draft_steps for c in by_context),
            sum(c.accepted for c in by_context),
        )

    before = counted()
    records = [record.speculation for record in records_of(client, path, body_of(path, ids, n=4, max_tokens=40))]
    steps, accepted = sum(r.draft_steps for r in records), sum(r.accepted for r in records)
    assert steps > 0
    gained = [after - already for after, already in zip(counted(), before, strict=True)]
    assert gained == [steps, accepted, steps, accepted]
