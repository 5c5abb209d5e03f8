"""verifiers: its command vf-eval plays a taskset (sums_taskset.py) with its evaluation client and its training client.

The training client renders prompts to token ids itself and calls POST /inference/v1/generate.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import MODEL, POLICY, Checks, equal

checks = Checks("verifiers")
BIN = Path(sys.executable).parent


def rollouts(kind: str, *options: str) -> list[dict]:
    """The traces of two rollouts for each of the taskset's two tasks: one trace in each episode."""
    folder = Path(tempfile.mkdtemp())
    command = [
        str(BIN / "vf-eval"), "sums_taskset", "--env.agent.harness.id", "null",
        "--env.agent.runtime.type", "subprocess", "--model", MODEL, "--num-rollouts", "2",
        "--client.type", kind, "--client.base-url", f"{checks.endpoint}/v1", "--client.api-key-var", "NO_KEY",
        "--sampling.max-tokens", "24", "--sampling.temperature", "1.0", "--no-push", "--output-dir", str(folder),
        *options,
    ]  # fmt: skip
    here = {"PYTHONPATH": str(Path(__file__).parent), "PATH": os.pathsep.join([str(BIN), os.environ["PATH"]])}
    subprocess.run(command, check=True, env=os.environ | here)
    (file,) = folder.glob("*/traces.jsonl")
    episodes = [json.loads(line) for line in file.read_text().splitlines()]
    traces = [trace for episode in episodes for trace in episode["traces"]]
    errors = [error for trace in traces for error in trace["errors"]]
    equal((len(traces), errors), (4, []), "traces and errors")
    return traces


@checks.call("vf-eval, evaluation client")
def evaluation() -> str:
    rewards = [trace["rewards"]["has_a_digit"]["score"] for trace in rollouts("eval")]
    assert all(rewards), rewards
    return "4 rollouts of 2 tasks, each with its reward"


@checks.call("vf-eval, training client")
def training() -> str:
    traces = rollouts("train", "--client.renderer-model-name", str(POLICY))
    nodes = [node for trace in traces for node in trace["nodes"] if node["sampled"]]
    for node in nodes:
        sampled = sum(node["mask"])
        assert sampled > 0, "no token was sampled"
        equal(len(node["logprobs"]), sampled, "log-probabilities of a response")
    return f"4 rollouts, {sum(sum(node['mask']) for node in nodes)} tokens, each with its log-probability"
