"""CONTRIBUTING.md's examples: each new part is written into a copy of the packages, named where it says, and used."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r'^```(python|diff) title="([\w/.]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)
PACKAGES = ("drafters", "rollout_service", "rl_loop")


def changed(text, diff):
    """`text` with the lines of `diff` taken out (-) and put in (+); its other lines say where, from the top down."""
    lines, at = text.splitlines(), 0
    for sign, line in ((change[:1], change[1:]) for change in diff.splitlines()):
        if sign != "+":
            at = lines.index(line, at) + (sign == " ")
        if sign == "-":
            del lines[at]
        if sign == "+":
            lines.insert(at, line)
            at += 1
    return "\n".join(lines) + "\n"


def test_a_change_that_fits_nowhere_is_an_error():
    assert changed("a\nb\nc\n", " a\n+x\n-c\n+d") == "a\nx\nb\nd\n"
    with pytest.raises(ValueError, match="not in list"):
        changed("a\nb\n", "-c")


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Runs Python code on a copy of the packages that has all the examples' parts; gives what it prints."""
    copy = tmp_path_factory.mktemp("copy")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    for language, path, body in BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        file = copy / path
        assert file.exists() == (language == "diff"), path
        file.write_text(changed(file.read_text(encoding="utf-8"), body) if language == "diff" else body)

    def run(code: str) -> str:
        path = os.pathsep.join(map(str, (copy, ROOT / "tests" / "unit")))
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=copy,
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_every_part_has_an_example():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files = {path for _, path, _ in BLOCK.findall(text)}
    for part, folder in {
        "drafter": "drafters/kinds", "loss": "rl_loop/losses", "task": "rl_loop/tasks",
        "route": "rollout_service/http/routes", "metric": "rollout_service/telemetry",
    }.items():  # fmt: skip
        assert f"## Add a {part}\n" in text
        assert any(file.startswith(folder) for file in files), part


def test_the_drafter_is_configured_by_its_kind(python):
    said = python("""
from drafters.registry import DrafterConfig, make_drafter
from rollout_service.config import ServiceConfig
config = ServiceConfig(model="m", drafter={"kind": "suffix", "draft_tokens": 5})
print(make_drafter(config.drafter).speculative_config())
""")
    assert said == "{'method': 'suffix', 'num_speculative_tokens': 5}\n"


def test_the_loss_is_configured_by_its_kind_and_gives_a_gradient(python):
    said = python("""
import torch
from rl_loop.config import TrainConfig
from rl_loop.losses.policy_loss import Totals, policy_loss
from rl_loop.losses.terms import LossInput
loss = TrainConfig(model="m", loss={"kind": "reinforce", "average": "sequence"}).loss
logprobs_N = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
batch = LossInput(logprobs_N, logprobs_N.detach(), torch.tensor([1.0, 1.0, -1.0]), [2, 1])
found = policy_loss(loss, batch, Totals(tokens=3, sequences=2, longest=8))
found.loss.backward()
print(type(loss).__name__, found.loss.item(), logprobs_N.grad.tolist(), found.metrics["clip_fraction"].item())
""")
    assert said == "Reinforce -0.75 [-0.25, -0.25, 0.5] 0.0\n"


def test_the_task_is_configured_by_its_kind_and_grades(python):
    said = python("""
from rl_loop.task_config import TaskConfig
from rl_loop.tasks import make_task
task = make_task(TaskConfig(kind="sums"))
problem = task.prompt("train", 10_003)
assert problem == task.prompt("train", 3) != task.prompt("held_out", 3)
a, _, b, _ = problem.prompt.split()
print(type(task).__name__, task.reward(problem, f"Answer: {int(a) + int(b)}"), task.reward(problem, "none"))
""")
    assert said == "SumsTask 1.0 0.0\n"


def test_the_route_answers(python):
    said = python("""
import asyncio
from types import SimpleNamespace
from front import StubFleet, front

async def ask():
    fleet = StubFleet()
    fleet.members = [SimpleNamespace(index=0, load=8, restarts=1)]
    async with front(fleet) as (client, app):
        print((await client.get("/v1/engines")).json(), "/v1/engines" in app.openapi()["paths"])

asyncio.run(ask())
""")
    assert said == "[{'engine': 0, 'running': 8, 'restarts': 1}] True\n"


def test_the_metric_is_exposed(python):
    said = python("""
from rollout_service.protocol import Group, Sampling
from rollout_service.telemetry import Telemetry
telemetry = Telemetry()
telemetry.finished(Group(id="g", prompt_token_ids=[1] * 100, completions=[], sampling=Sampling(), engine=0))
print(telemetry.exposition({}).decode())
""")
    assert "rollout_prompt_tokens_total 100.0" in said
