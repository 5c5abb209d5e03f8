"""The client, sync and async: streams, answers of other versions and of gateways, and timeouts."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest
from test_endpoint import no_proxies, serving  # noqa: F401  (a fixture)

from rl_loop.run.ledger import Heartbeat, Ledger
from rollout_service.bearer_token import WithAdminToken
from rollout_service.client import AsyncRolloutClient, GroupStream, RolloutClient, RolloutError
from rollout_service.http.guard import Guard
from rollout_service.http.tokens import Tokens
from rollout_service.protocol import (
    INTERFACE_VERSION,
    VERSION_HEADER,
    Batch,
    BatchesStatus,
    Completion,
    DraftChoice,
    DraftSchedule,
    ErrorBody,
    Group,
    GroupRequest,
    LeaseRequest,
    LeaseStatus,
    PromptsRequest,
    PromptsStatus,
    Sampling,
    Speculation,
    SpeculationStatus,
    WeightSpan,
    WeightsStatus,
    WeightStatus,
)


@pytest.fixture(params=["sync", "async"])
def ask(request):
    """`ask(handler, method, *arguments)` gives the method's results as a list, and the RolloutError that ended it."""

    async def asynchronous(handler, method, arguments, found, **options):
        async with AsyncRolloutClient("http://service", **options) as client:
            client.http = httpx.AsyncClient(**client.options, transport=httpx.MockTransport(handler))
            if method == "rollouts":
                async for group in client.rollouts(*arguments):
                    found.append(group)
            else:
                found.append(await getattr(client, method)(*arguments))

    def synchronous(handler, method, arguments, found, **options):
        with RolloutClient("http://service", **options) as client:
            client.http = httpx.Client(**client.options, transport=httpx.MockTransport(handler))
            answer = getattr(client, method)(*arguments)
            found.extend(answer if method == "rollouts" else [answer])

    def ask(handler, method, *arguments, **options):
        found = []
        try:
            if request.param == "sync":
                synchronous(handler, method, arguments, found, **options)
            else:
                asyncio.run(asynchronous(handler, method, arguments, found, **options))
        except RolloutError as error:
            return found, error
        return found, None

    return ask


def answering(content, status=200, headers=None):
    return lambda request: httpx.Response(status, content=content, headers=headers)


def group(name, text="a", **metadata):
    completion = Completion(
        index=0, text=text, token_ids=[1], logprobs=[-1.0], finish_reason="stop",
        weight_versions=[WeightSpan(version=0, start=0, end=1)],
        speculation=Speculation(
            drafter="mtp", drafter_version=0, draft_steps=1, drafted=3, accepted=1, accepted_histogram=[0, 1]
        ),
    )  # fmt: skip
    return Group(
        id=name, prompt_token_ids=[1], completions=[completion], sampling=Sampling(), engine=0, metadata=metadata
    )


def lines(*told):
    return "".join(one.model_dump_json(exclude_none=True) + "\n" for one in told).encode()


def requests(count):
    return [GroupRequest(prompt="1") for _ in range(count)]


# --- streams ---

SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r\n"


def test_a_group_may_hold_every_line_separator_in_text_and_metadata(ask):
    sent = [group("a", text=SEPARATORS, source=SEPARATORS), group("b")]
    assert ask(answering(lines(*sent)), "rollouts", requests(2)) == (sent, None)


def test_lines_are_whole_however_the_bytes_arrive():
    sent, stream = [group("a", text=f"é{SEPARATORS}"), group("b")], GroupStream(requested=2)
    content = lines(*sent).removesuffix(b"\n")
    arrived = [one for i in range(len(content)) for one in stream.feed(content[i : i + 1])]
    assert arrived == sent[:1]
    assert list(stream.end()) == sent[1:]


def test_a_group_that_failed_costs_none_of_the_others(ask):
    failures = [ErrorBody(error=f"refused {name}", group=name) for name in "bd"]
    sent = lines(group("a"), failures[0], group("c"), failures[1], group("e"))
    found, error = ask(answering(sent), "rollouts", requests(5))
    assert [one.id for one in found] == ["a", "c", "e"]
    assert (error.status, error.failed) == (422, failures)
    assert "2 of 5 groups failed" in str(error)
    assert "b: refused b" in str(error)


def test_a_stream_that_cannot_be_finished_raises_after_the_finished_groups(ask):
    found, error = ask(answering(lines(group("a"), ErrorBody(error="engines died"))), "rollouts", requests(3))
    assert [one.id for one in found] == ["a"]
    assert (error.status, error.body.error, error.failed) == (503, "engines died", [])


@pytest.mark.parametrize("cut", [0, 30], ids=["between-lines", "within-a-line"])
def test_a_stream_that_a_gateway_cut_is_not_taken_for_a_complete_one(cut, ask):
    found, error = ask(answering(lines(group("a")) + lines(group("b"))[:cut]), "rollouts", requests(2))
    assert [one.id for one in found] == ["a"]
    assert error.status == 503
    assert "the stream was cut" in str(error)


# --- other versions ---


def grown(value):
    """The JSON value with an unknown field in every object, but for metadata, whose keys are no fields."""
    if isinstance(value, list):
        return [grown(one) for one in value]
    if isinstance(value, dict):
        return {"new": {"er": 1}} | {k: v if k == "metadata" else grown(v) for k, v in value.items()}
    return value


WEIGHT = WeightStatus(version=3, tensors=1, bytes=1, checksum="")
CHOICE = DraftChoice(batch_size=8, draft_tokens=0, tokens_per_second=[100.0, 90.0], threshold=117.0)
SCHEDULE = DraftSchedule(engine=0, source="auto", ranges=[(1, 8, 0)], choices=[CHOICE], reason="chosen")
LEASED = LeaseStatus(lease="l", groups=["a"])
BATCHES = BatchesStatus(
    waiting=0, generating=0, finished=0, leased=0, acknowledged=0, capacity=1, oldest_seconds=0.0, oldest_version=None,
    ages=[], leases=[{"lease": "l", "groups": 1, "seconds_left": 1.0}], dropped=0, tokens_wasted=0, persistent=True,
)  # fmt: skip
METHODS = [
    ("weights", (), WeightsStatus(policy=WEIGHT, drafter=WEIGHT, dtype="float32", shared_memory="/no")),
    ("speculation", (), SpeculationStatus(drafters=[], schedules=[SCHEDULE])),
    ("send_prompts", (PromptsRequest(groups=requests(1)),), PromptsStatus(accepted=1, known=0)),
    ("lease", (LeaseRequest(),), Batch(lease="l", groups=[group("a", mine=1)], version=3)),
    ("acknowledge", ("l",), LEASED),
    ("release", ("l",), LEASED),
    ("extend", ("l", 60.0), LEASED),
    ("batches", (), BATCHES),
]


@pytest.mark.parametrize(("method", "arguments", "answer"), METHODS, ids=[method for method, *_ in METHODS])
def test_new_fields_of_a_newer_service_are_ignored(method, arguments, answer, ask):
    content = json.dumps(grown(json.loads(answer.model_dump_json()))).encode()
    assert ask(answering(content), method, *arguments) == ([answer], None)


def test_new_fields_within_a_stream_are_ignored(ask):
    sent = [group("a", mine={"of": 1}), ErrorBody(error="no", group="b")]
    content = "".join(json.dumps(grown(one.model_dump(mode="json"))) + "\n" for one in sent).encode()
    found, error = ask(answering(content), "rollouts", requests(2))
    assert (found, error.failed) == (sent[:1], sent[1:])


def test_new_fields_of_an_error_are_ignored(ask):
    body = grown({"error": "bad", "problems": [{"field": "n", "message": "too many"}]})
    _, error = ask(answering(json.dumps(body), 400), "weights")
    assert (error.status, str(error)) == (400, "400: bad\n  n: too many")


@pytest.mark.parametrize("method", ["weights", "model"])
def test_another_server_at_the_address_is_not_taken_for_a_service(method, ask):
    for content in (b"<html>login</html>", b'{"hello": 1}', b"[]"):
        _, error = ask(answering(content, headers={"Content-Type": "text/html"}), method)
        assert error.status == 200
        assert "another server" in str(error)
        assert "text/html" in str(error)


@pytest.mark.parametrize("method", ["weights", "rollouts"])
def test_an_answer_of_a_gateway_is_an_error_with_its_status_and_text(method, ask):
    html = b"<html>\n<h1>502 Bad Gateway</h1></html>" + b" " * 1000
    asked = answering(html, 502, {"Content-Type": "text/html"})
    _, error = ask(asked, method, *([requests(1)] if method == "rollouts" else []))
    assert error.status == 502
    assert "gateway" in str(error)
    assert "<html> <h1>502 Bad Gateway</h1></html>" in str(error)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("5", 5.0),
        (timedelta(seconds=90), 90.0),
        (timedelta(seconds=-90), 0.0),
        ("Wed, 21 Oct 2015 07:28:00 -0000", 0.0),
        ("soon", None),
        ("nan", None),
        (None, None),
    ],
)
def test_retry_after_is_seconds_or_a_date(value, seconds, ask):
    if isinstance(value, timedelta):  # from now
        value = format_datetime(datetime.now(UTC) + value, usegmt=True)
    headers = {} if value is None else {"Retry-After": value}
    _, error = ask(answering(ErrorBody(error="slow down").model_dump_json(), 429, headers), "weights")
    assert (error.status, error.body.error) == (429, "slow down")
    assert error.retry_after == (seconds if seconds is None else pytest.approx(seconds, abs=30.0))


def test_the_client_sends_its_version_with_every_request(ask):
    said = []

    def service(request):
        said.append(request.headers[VERSION_HEADER])
        return httpx.Response(503)

    for method, arguments, _ in METHODS:
        ask(service, method, *arguments)
    ask(service, "rollouts", requests(1))
    assert said == [str(INTERFACE_VERSION)] * (len(METHODS) + 1)


@pytest.mark.parametrize("version", [str(INTERFACE_VERSION + 1), "0", "new"])
def test_a_client_of_another_version_is_refused_and_one_without_a_version_is_served(version):
    async def inner(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"served"})

    async def statuses():
        guard = Guard(inner, tokens=Tokens(WithAdminToken()), body_limit=100, stopping=asyncio.Event())
        transport = httpx.ASGITransport(guard)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            return [
                await client.get("/v1/weights", headers=headers)
                for headers in ({VERSION_HEADER: version}, {VERSION_HEADER: str(INTERFACE_VERSION)}, {})
            ]

    refused, *served = asyncio.run(statuses())
    assert refused.status_code == 400
    error = ErrorBody.model_validate_json(refused.content).error
    assert f"version {version}" in error
    assert f"version {INTERFACE_VERSION}" in error
    assert [answer.text for answer in served] == ["served", "served"]


def test_both_clients_have_every_call_with_a_docstring():
    of_both = {name for name, *_ in METHODS} | {"model", "cancel_prompts", "return_leases", "rollouts"}
    for client in (RolloutClient, AsyncRolloutClient):
        assert [name for name in of_both if not getattr(client, name).__doc__] == []


@pytest.mark.parametrize(("method", "path"), [("cancel_prompts", "/v1/prompts"), ("return_leases", "/v1/batches")])
def test_an_answer_that_nobody_reads_is_still_checked(method, path, ask):
    asked = []

    def service(request):
        asked.append((request.method, request.url.path, dict(request.url.params)))
        return httpx.Response(200 if len(asked) == 1 else 503, json={})

    assert ask(service, method, "a&b") == ([None], None)
    assert ask(service, method, "a&b")[1].status == 503
    assert asked == [("DELETE", path, {"run": "a&b"})] * 2


# --- waiting ---


@contextlib.contextmanager
def silent():
    """A server that accepts connections and never answers, like a half-open connection, and how many it accepted."""
    taken = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def take():
            with contextlib.suppress(OSError):
                while True:
                    taken.append(listener.accept()[0])

        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", taken
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()
    for connection in taken:
        connection.close()


def test_a_service_that_never_answers_times_out_and_the_error_says_after_how_long():
    async def asynchronous(url):
        async with AsyncRolloutClient(url, read_timeout=0.2) as client:
            await client.weights()

    with silent() as (url, _), RolloutClient(url, read_timeout=0.2) as client:
        for ask in (client.weights, lambda: client.acknowledge("l"), lambda: asyncio.run(asynchronous(url))):
            with pytest.raises(httpx.ReadTimeout, match=r"no answer within 0\.2 s"):
                ask()
        assert not client.ready()


def test_a_half_open_connection_does_not_stop_the_heartbeat():
    with silent() as (url, taken), RolloutClient(url, read_timeout=0.05) as client:
        ledger = Ledger(0, [], [])
        ledger.held["l"] = {"train-000000000"}
        heartbeat = Heartbeat(client, ledger, seconds=0.2)
        heartbeat.start()
        deadline = time.monotonic() + 10.0
        while len(taken) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        heartbeat.stop()
        heartbeat.join(5.0)
        assert not heartbeat.is_alive()
        assert len(taken) >= 3
        assert ledger.held, "a lease that may still be valid is not given up"


@pytest.mark.parametrize(
    ("method", "arguments", "seconds"),
    [
        ("weights", (), 60.0),
        ("acknowledge", ("l",), 60.0),
        ("lease", (LeaseRequest(wait=100.0),), 160.0),
        ("extend", ("l", 120.0), 30.0),  # a hanging heartbeat leaves time for another one
        ("extend", ("l", 86400.0), 60.0),
        ("rollouts", (requests(1),), 7200.0),
    ],
)
def test_every_request_has_a_timeout_that_fits_its_answer(method, arguments, seconds, ask):
    waits = []

    def service(request):
        waits.append(request.extensions["timeout"]["read"])
        return httpx.Response(503)

    ask(service, method, *arguments)
    assert waits == [seconds]


def test_a_push_waits_for_the_loading_of_every_engine():
    import torch

    waits = []

    def service(request):
        waits.append(request.extensions["timeout"]["read"])
        return httpx.Response(200, content=(WEIGHT if request.method == "POST" else METHODS[0][2]).model_dump_json())

    with RolloutClient("http://service") as client:
        client.http = httpx.Client(**client.options, transport=httpx.MockTransport(service))
        client.push_weights("policy", {"a": torch.ones(1)}, 1)
    assert waits == [60.0, 1800.0]


def test_a_push_names_its_run_and_a_run_that_ends_releases_the_weights():
    import torch

    asked = []

    def service(request):
        asked.append((request.method, dict(request.url.params)))
        if request.method == "DELETE":
            return httpx.Response(200, json={"released": 1})
        return httpx.Response(200, content=(WEIGHT if request.method == "POST" else METHODS[0][2]).model_dump_json())

    with RolloutClient("http://service") as client:
        client.http = httpx.Client(**client.options, transport=httpx.MockTransport(service))
        client.push_weights("policy", {"a": torch.ones(1)}, 1)
        client.push_weights("policy", {"a": torch.ones(1)}, 2, "a&b", take_over=True)
        client.release_weights("a&b")
    pushes = [params for method, params in asked if method == "POST"]
    assert [params.keys() for params in pushes] == [
        {"version", "checksum"},
        {"version", "checksum", "run", "take_over"},
    ]
    assert (pushes[1]["run"], pushes[1]["take_over"]) == ("a&b", "true")
    assert asked[-1] == ("DELETE", {"run": "a&b"})


async def test_connections_have_keepalive():
    def is_kept_alive(answer):
        connection = answer.extensions["network_stream"].get_extra_info("socket")
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
        return connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) != 0

    with serving() as (port, _):
        with RolloutClient(f"http://127.0.0.1:{port}") as client, client.http.stream("GET", "/") as answer:
            assert is_kept_alive(answer)
        client = AsyncRolloutClient(f"http://127.0.0.1:{port}")
        async with client, client.http.stream("GET", "/") as answer:
            assert is_kept_alive(answer)
