"""A service on a public address, with a certificate and a token: rollouts and pushes over https."""

import httpx
import pytest
from engines import launched
from over_http import policy_tensors
from tls_files import self_signed

from rollout_service.client import EndpointError, RolloutClient, RolloutError
from rollout_service.protocol import GroupRequest


@pytest.fixture(scope="module")
def front(tmp_path_factory):
    """The port of the service, and the file of its authority."""
    pair = self_signed(tmp_path_factory.mktemp("tls"))
    flags = ("--config", "deploy/demo/service.toml", "--drafter.kind", "none", "--host", "0.0.0.0", "--token", "secret")
    with launched(*flags, *pair.flags) as (url, _):
        assert url.startswith("https://0.0.0.0:")
        yield int(url.rpartition(":")[2]), pair.certificate


def test_a_client_with_the_authority_and_the_token_generates_and_pushes(front):
    port, ca_file = front
    with RolloutClient(f"https://127.0.0.1:{port}", "secret", ca_file=ca_file) as client:
        (group,) = client.rollouts([GroupRequest(prompt="12 + 34 =", n=2)])
        assert all(completion.token_ids for completion in group.completions)
        assert client.push_weights("policy", policy_tensors(), 1).version == 1
        assert client.ready()


def test_others_are_refused(front):
    port, ca_file = front
    with RolloutClient(f"https://127.0.0.1:{port}", "secret") as client, pytest.raises(EndpointError, match="ca_file"):
        client.weights()
    with (
        RolloutClient(f"https://127.0.0.1:{port}", ca_file=ca_file) as client,
        pytest.raises(RolloutError, match="401"),
    ):
        client.weights()
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False)
