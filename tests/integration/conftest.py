"""One launched service, shared by all tests that go over HTTP."""

from collections.abc import Iterator

import pytest
from engines import launched


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", type=int, default=5, help="how many faults a training run suffers")
    parser.addoption("--faults-within", type=float, default=55.0, help="seconds after which no more are inflicted")
    parser.addoption("--faults-seed", type=int, default=None, help="which, and when; random when not given")


@pytest.fixture(scope="session")
def service() -> Iterator[str]:
    """The demo's service with its MTP head on."""
    with launched("--config", "deploy/demo/service.toml", "--drafter.kind", "mtp") as (url, _):
        yield url
