"""One launched service, shared by all tests that go over HTTP."""

from collections.abc import Iterator

import pytest
from engines import launched


@pytest.fixture(scope="session")
def service() -> Iterator[str]:
    """The demo's service with its MTP head on."""
    with launched("--config", "deploy/demo/service.toml", "--drafter.kind", "mtp") as (url, _):
        yield url
