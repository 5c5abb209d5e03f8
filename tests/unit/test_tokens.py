"""Two tokens: the token opens what trainers use, the admin token opens the control routes too."""

import pytest
from front import StubFleet, front

from rollout_service.protocol import CONTROL_PATHS

TOKEN, ADMIN = {"token": "secret"}, {"admin_token": "boss"}


async def statuses(path, **tokens):
    """The statuses of a request without a token, with a wrong one, with the token, and with the admin token. A path
    that no route has is 404 once the tokens let it through."""
    async with front(StubFleet(**tokens)) as (client, _):
        given = ({}, *({"Authorization": f"Bearer {token}"} for token in ("wrong", "secret", "boss")))
        return [(await client.get(path, headers=headers)).status_code for headers in given]


@pytest.mark.parametrize("path", sorted(CONTROL_PATHS))
async def test_a_control_path_opens_for_the_admin_token_alone(path):
    opened = (await statuses(path))[0]
    assert opened not in (401, 403)
    assert await statuses(path, **TOKEN, **ADMIN) == [401, 401, 403, opened]
    assert await statuses(path, **TOKEN) == [401, 401, 403, 401]


@pytest.mark.parametrize("path", ["/v1/weights", "/v1/models", "/version"])
async def test_every_other_path_opens_for_both_tokens(path):
    assert await statuses(path, **TOKEN, **ADMIN) == [401, 401, 200, 200]
    assert await statuses(path, **TOKEN) == [401, 401, 200, 401]


@pytest.mark.parametrize("path", ["/health", "/ping"])
async def test_a_probe_needs_no_token(path):
    assert await statuses(path, **TOKEN, **ADMIN) == [200] * 4


@pytest.mark.parametrize(
    ("more", "said"),
    [({}, "set admin_token or admin_token_file of the service"), (ADMIN, "control routes ask for the admin token")],
)
async def test_a_closed_control_route_says_which_setting_opens_it(more, said):
    async with front(StubFleet(**TOKEN, **more)) as (client, _):
        answer = await client.post("/pause", headers={"Authorization": "Bearer secret"})
    assert answer.status_code == 403
    assert said in answer.json()["error"]
    assert "boss" not in answer.text
