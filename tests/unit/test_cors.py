"""CORS: pages of the configured origins may call the service, and no others."""

import pytest
from front import StubFleet, front
from pydantic import ValidationError

from rollout_service.config import ServiceConfig

PAGE = "https://page.org"


def preflight(origin, method="POST"):
    return {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "authorization, content-type",
    }


async def test_a_preflight_of_a_configured_origin_needs_no_token():
    async with front(StubFleet(token="secret", cors={"origins": [PAGE]})) as (client, _):
        allowed = await client.options("/v1/completions", headers=preflight(PAGE))
        other = await client.options("/v1/completions", headers=preflight("https://other.org"))
        call = await client.get("/v1/models", headers={"Origin": PAGE})
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in allowed.headers["access-control-allow-headers"]
    assert other.status_code == 400
    assert "access-control-allow-origin" not in other.headers
    assert call.status_code == 401  # the call itself does
    assert call.headers["access-control-allow-origin"] == PAGE
    assert "X-Request-Id" in call.headers["access-control-expose-headers"]


async def test_without_origins_no_page_may_call():
    async with front(StubFleet()) as (client, _):
        assert (await client.options("/health", headers=preflight(PAGE, "GET"))).status_code == 403
        assert "access-control-allow-origin" not in (await client.get("/health", headers={"Origin": PAGE})).headers


@pytest.mark.parametrize(("origin", "status"), [(PAGE, 403), ("null", 403), ("http://service", 200), (None, 200)])
async def test_what_a_browser_sends_without_asking_first_is_refused_to_pages_of_others(origin, status):
    """Such as a POST without a content type, which the control routes take."""
    fleet, paused = StubFleet(), []

    async def pause(*how):
        paused.append(how)

    fleet.pausing.pause = pause
    async with front(fleet) as (client, _):
        answer = await client.post("/pause", headers={"Origin": origin} if origin else {})
    assert answer.status_code == status
    assert len(paused) == (status == 200)
    assert ("name it in cors.origins" in answer.text) == (status == 403)


async def test_a_page_that_is_named_may_call():
    for origins in ([PAGE], ["*"]):
        async with front(StubFleet(cors={"origins": origins})) as (client, _):
            assert (await client.post("/v1/batches/lease", json={}, headers={"Origin": PAGE})).status_code == 200


async def test_an_unforeseen_error_can_be_read_by_the_page():
    async with front(StubFleet(cors={"origins": ["*"]})) as (client, app):
        app.state.background.queue.close()
        answer = await client.post("/v1/batches/lease", json={}, headers={"Origin": PAGE})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (500, "*")


@pytest.mark.parametrize(
    ("cors", "said"),
    [
        ({"origins": ["*"], "credentials": True}, 'credentials: cannot be given to all origins ("*")'),
        ({"origins": ["page.org"]}, "is no origin"),
        ({"origins": ["https://page.org/"]}, "without a path"),
    ],
)
def test_what_would_open_the_service_to_all_or_to_none_is_refused(cors, said):
    with pytest.raises(ValidationError) as wrong:
        ServiceConfig(model="m", cors=cors)
    assert said in str(wrong.value)
