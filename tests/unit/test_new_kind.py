"""A new kind of drafter needs a file and a line in the registry; to train it, it needs one more of each."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from drafters.registry import KINDS, LEARNERS

ROOT = Path(__file__).resolve().parents[2]
KIND = """
from drafters.drafter import Drafter

class ParrotDrafter(Drafter):
    kind = "parrot"
    has_folder = True

    def speculative_config(self):
        return self._sampled("parrot", model=self._model())

    @classmethod
    def recognised(cls, config, sizes):
        return {"voice": "loud"} if "parrot" in config else None
"""
LEARNER = """
from drafters.learners.learner import DrafterLearner

class ParrotLearner(DrafterLearner):
    kind = "parrot"
"""
IMPORT = "from drafters.kinds.parrot import ParrotDrafter\n"


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Run Python code with a copy of `drafters` that has the kind `parrot`, and with the other packages unchanged."""
    copy = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "drafters", copy / "drafters", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "drafters" / "kinds" / "parrot.py").write_text(KIND)
    (copy / "drafters" / "learners" / "parrot.py").write_text(LEARNER)
    registry = copy / "drafters" / "registry.py"
    text = registry.read_text()
    text = text.replace("MTPDrafter)", "MTPDrafter, ParrotDrafter)")
    text = text.replace("LEARNERS = {\n", 'LEARNERS = {\n    "parrot": "drafters.learners.parrot:ParrotLearner",\n')
    registry.write_text(text.replace("from drafters.kinds.none", IMPORT + "from drafters.kinds.none"))

    def run(code: str) -> str:
        environment = os.environ | {"PYTHONPATH": f"{copy}{os.pathsep}{ROOT}", "COLUMNS": "200"}
        done = subprocess.run([sys.executable, "-c", code], cwd=copy, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_a_service_with_the_new_kind_is_launched_and_reports_it(python):
    code = """
import sys
from rollout_service.cli import main
sys.argv = ["rollout-service", "launch", *sys.argv[1:], {}]
main()
"""
    assert "mtp, parrot; kind none reads" in python(code.format('"--help"'))
    asked = python(code.format('"--model=m", "--drafter.kind=parrot", "--drafter.model=p", "--dry-run"'))
    assert '"kind": "parrot"' in asked


def test_the_new_kind_is_compared_and_trained_with_the_policy(python):
    said = python("""
from rl_loop.config import TrainConfig
from rollout_service.evaluation.compare_config import CompareConfig
compared = CompareConfig(model="m", prompts="drafters/registry.py", drafters=[{"kind": "parrot", "model": "p"}])
print([arm.kind for arm in compared.arms()])
print(TrainConfig(model="m", online_drafter={"kind": "parrot", "model": "p"}).online_drafter.kind)
""")
    assert said.splitlines() == ["['none', 'parrot']", "parrot"]


def test_drafters_train_offers_it_without_loading_torch(python):
    said = python("""
import sys
from drafters.cli import main
try:
    main(["train", "--help"])
finally:
    print("torch" in sys.modules)
""")
    assert "--kind {parrot,eagle3,mtp,draft_model}" in said
    assert said.endswith("False\n")
    said = python("from drafters.learners.factory import learner_class; print(learner_class('parrot').__name__)")
    assert said == "ParrotLearner\n"


def test_drafters_inspect_recognises_its_checkpoint(python, tmp_path):
    folder = ROOT / "deploy" / "demo" / "models" / "draft_model"
    shutil.copy(folder / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text('{"parrot": true}')
    said = python(f"from drafters.cli import main; main(['inspect', {str(tmp_path)!r}])")
    assert all(word in said for word in ("parrot", "loud", "num_speculative_tokens"))


def test_only_a_kinds_own_files_and_the_registry_name_it():
    """The kind `none` is left out, since other fields use that word too."""
    own = {kind: {ROOT / f"{cls.__module__.replace('.', '/')}.py"} for kind, cls in KINDS.items() if kind != "none"}
    for kind, learner in LEARNERS.items():
        own[kind].add(ROOT / f"{learner.partition(':')[0].replace('.', '/')}.py")
    found = []
    for package in ("drafters", "rollout_service", "rl_loop"):
        for file in (ROOT / package).rglob("*.py"):
            constants = {n.value for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Constant)}
            found += [(file, kind) for kind in own if kind in constants and file not in own[kind]]
    assert {file for file, _ in found} == {ROOT / "drafters" / "registry.py"}
