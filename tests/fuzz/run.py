"""Schemathesis with all its checks against a service, which is launched without and with a token.

    make fuzz                                    ten minutes
    python tests/fuzz/run.py --seconds 60        one minute

The exit code is 1 if it finds a fault. It runs in a separate environment, which uv installs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "integration"))

from engines import launched  # noqa: E402

TOOL = "schemathesis==4.32.5"
REQUEST_WITHIN = 30
"""seconds; a request that takes longer counts as hanging"""


def fuzz(url: str, seconds: int, *more: str) -> int:
    command = [
        str(Path(sys.executable).parent / "uv"), "tool", "run", "--from", TOOL,
        "st", "--config-file", str(HERE / "schemathesis.toml"), "run", f"{url}/openapi.json",
        "--max-time", str(seconds), "--request-timeout", str(REQUEST_WITHIN), *more,
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:  # it leaves a cache in the folder where it runs
        hooks = {"SCHEMATHESIS_HOOKS": str(HERE / "hooks.py")}
        return subprocess.run(command, env=os.environ | hooks, cwd=folder).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=600, help="of both rounds together")
    half = parser.parse_args().seconds // 2
    config = ("--config", "deploy/demo/service.toml", "--drafter.schedule", "fixed")
    codes = []
    with launched(*config) as (url, _):
        codes.append(fuzz(url, half))
    with launched(*config, "--token", "secret", "--admin_token", "of the admin") as (url, _):
        codes.append(fuzz(url, half, "--header", "Authorization: Bearer of the admin"))
    sys.exit(int(any(codes)))


if __name__ == "__main__":
    main()
