"""Commands against a running service: audit, compare, train."""

import json
import subprocess
import sys
from pathlib import Path

from engines import MODELS, ROOT

from drafters.files.text_lines import json_lines
from rollout_service.evaluation.audit import audit
from rollout_service.evaluation.audit_config import AuditConfig
from rollout_service.evaluation.compare import compare
from rollout_service.evaluation.compare_config import CompareConfig

KEYS = {
    "drafter", "draft_tokens", "concurrency", "acceptance_length", "acceptance_length_ci", "acceptance_rate",
    "acceptance_by_position", "tokens_per_second", "speedup", "z", "tokens",
}  # fmt: skip


def test_the_audit_passes_a_running_endpoint(client, service, tmp_path):
    config = AuditConfig(
        model=str(MODELS / "policy"), endpoint=service, temperature=[1.0, 0.0], top_p=[0.9], top_k=[0], tokens=3000,
        contexts=8, output=tmp_path,
    )  # fmt: skip
    rows = audit(config)
    assert [row.failures for row in rows] == [[], []]
    assert rows[0].positions.keys() >= {"draft 1", "draft 2", "draft 3", "bonus", "undrafted", "context limit"}
    assert rows[1].greedy.identical + rows[1].greedy.explained == rows[1].greedy.compared
    assert [row["drafter"] for row in json.loads((tmp_path / "audit.json").read_text())] == ["mtp", "mtp"]


def test_compare_measures_a_running_endpoint(client, service, tmp_path):
    config = CompareConfig(
        model=str(MODELS / "policy"), prompts=ROOT / "deploy/demo/prompts.jsonl", endpoint=service, tokens=2000,
        response_tokens=40, concurrency=[8], rounds=1, output=tmp_path,
    )  # fmt: skip
    (row,) = compare(config)
    assert row.drafter == "mtp"
    assert row.tokens >= 2000
    assert abs(row.z) < 4
    (written,) = json.loads((tmp_path / "compare.json").read_text())
    assert written.keys() >= KEYS
    files = {"compare.json", "compare.md", "costs.json", "acceptance.png", "speedup.png"}
    assert {file.name for file in tmp_path.iterdir()} == files


def test_training_over_http_publishes_its_policy_and_agrees_on_log_probabilities(client, service, tmp_path):
    version = client.weights().policy.version
    done = subprocess.run(
        [str(Path(sys.executable).parent / "rl-loop"), "train", "--config", "deploy/demo/train.toml",
         "--endpoint", service, "--steps", "2", "--prompts_per_step", "8", "--evaluate_every", "0",
         "--output", str(tmp_path / "run")],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    steps = list(json_lines(tmp_path / "run" / "metrics.jsonl"))
    assert [s["step"] for s in steps] == [1, 2]
    assert client.weights().policy.version > version
    for step in steps:
        assert set(step["stages"]) == {"data", "prepare", "generation", "logprob", "train"}
        assert step["logprob_difference_max"] < 1e-4
        assert abs(step["z"]) < 4
        assert step["acceptance_length"] > 1.5
