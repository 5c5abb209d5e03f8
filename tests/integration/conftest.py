"""One launched service, shared by all tests that go over HTTP; and which tests run in one process."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import MODELS, Kept, launched
from over_http import policy_tensors
from xdist.scheduler import LoadScopeScheduling

from rollout_service.client import RolloutClient


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", type=int, default=5, help="how many faults a training run suffers")
    parser.addoption("--faults-within", type=float, default=300.0, help="seconds after which no more are inflicted")
    parser.addoption("--faults-record", type=Path, default=None, help="a file for the record of a run with faults")
    parser.addoption("--bad-requests", type=int, default=500, help="how many are sent beside a training run")
    parser.addoption("--faults-seed", type=int, default=17, help="which, and when")


KINDS = "ngram", "draft_model", "eagle3", "mtp"
BY_KIND = "test_idle_drafter", "test_lossless", "test_schedule"
"""files whose tests share an engine of a kind of drafter; the MTP head's where no kind is named"""
OVER_HTTP = "test_asynchronous", "test_commands", "test_generate", "test_pushes", "test_rollout_record", "test_service"
"""files whose tests share a service"""


def group_of(nodeid: str) -> str:
    """The tests of one group run in one process, one after the other. Elsewhere a group is a file."""
    path, _, name = nodeid.partition("::")
    file = Path(path).stem
    if file in BY_KIND:
        parameters = name.partition("[")[2].rstrip("]").split("-")
        return next((kind for kind in KINDS if kind in parameters), "mtp")
    return "service" if file in OVER_HTTP else file


class ByGroup(LoadScopeScheduling):
    """xdist's own `loadgroup` does not group with pytest 9: it renames tests, and pytest keeps their names."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByGroup:
    return ByGroup(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: group_of(item.nodeid))


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
