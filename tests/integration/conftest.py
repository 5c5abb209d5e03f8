"""One launched service, shared by all tests that go over HTTP; and which tests run in one process."""

import json
import shutil
from collections.abc import Iterator

import pytest
from engines import MODELS, Kept, launched
from over_http import policy_tensors

from rollout_service.client import RolloutClient


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", type=int, default=5, help="how many faults a training run suffers")
    parser.addoption("--faults-within", type=float, default=300.0, help="seconds after which no more are inflicted")
    parser.addoption("--bad-requests", type=int, default=500, help="how many are sent beside a training run")
    parser.addoption("--faults-seed", type=int, default=17, help="which, and when")


KINDS = "ngram", "draft_model", "eagle3", "mtp"
BY_KIND = "test_idle_drafter", "test_lossless", "test_schedule"
"""files whose tests share an engine of a kind of drafter; the MTP head's where no kind is named"""


def group_of(item: pytest.Item) -> str:
    if "service" in getattr(item, "fixturenames", ()):
        return "service"
    if item.path.stem in BY_KIND:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        return f"engine of {next((kind for kind in KINDS if kind in parameters), 'mtp')}"
    return item.path.stem


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one group run in one process, one after the other."""
    items.sort(key=group_of)
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group_of(item)))


@pytest.fixture(scope="session", autouse=True)
def no_engine_is_left() -> Iterator[None]:
    yield
    Kept.end()


@pytest.fixture(scope="session")
def service(tmp_path_factory) -> Iterator[str]:
    """The demo's service with its MTP head. The checkpoint's sampling defaults are poisoned: if they had any effect,
    no sample would follow the policy."""
    folder = tmp_path_factory.mktemp("service") / "policy"
    shutil.copytree(MODELS / "policy", folder)
    file = folder / "generation_config.json"
    poison = {"temperature": 0.1, "top_p": 0.05, "top_k": 1, "do_sample": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | poison))
    drafter = ("--drafter.kind", "mtp", "--drafter.schedule", "fixed")  # tests of counts need a fixed draft length
    with launched("--config", "deploy/demo/service.toml", "--model", str(folder), *drafter) as (url, _):
        yield url


@pytest.fixture(scope="module")
def client(service: str) -> Iterator[RolloutClient]:
    """A client of a service that has the checkpoint's policy, whatever tests of other files have pushed."""
    with RolloutClient(service) as client:
        client.push_weights("policy", policy_tensors(), client.weights().policy.version + 1)
        yield client
