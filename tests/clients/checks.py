"""What a client's script says about its calls: one line of JSON a call. Needs the standard library only.

    checks = Checks("openai")

    @checks.call("chat.completions.create")
    def chat() -> str:
        ...                            # an exception is a failure
        return "usage, n, stop"        # what was seen, for the table

`run.py` starts a script in the client's own environment, as `python SCRIPT ENDPOINT RESULTS`.
"""

import asyncio
import importlib.metadata
import inspect
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
POLICY = ROOT / "deploy" / "demo" / "models" / "policy"
MODEL = "demo-policy"
"""the policy's name in requests"""
PROMPTS = [
    "State the final answer to the following arithmetic problem: 12 + 34 - 56 =\n",
    "State the final answer to the following arithmetic problem: 71 - 26 + 30 =\n",
]


class Checks:
    def __init__(self, package: str):
        """`package` is the client's, as it is installed in this environment."""
        self.version = importlib.metadata.version(package)
        self.endpoint = sys.argv[1]
        self.results = Path(sys.argv[2]).resolve()
        self.loop = asyncio.Runner()
        """one event loop for all coroutines, since a client may keep a connection in it"""

    def call(self, what: str) -> Callable[[Callable[[], Any]], None]:
        """Run a function, or a coroutine function, at once, and write down what became of it."""

        def run(check: Callable[[], Any]) -> None:
            try:
                seen = check()
                if inspect.iscoroutine(seen):
                    seen = self.loop.run(seen)
                self.write(what, True, seen or "")
            except Exception as error:
                traceback.print_exc()
                self.write(what, False, f"{type(error).__name__}: {error}")

        return run

    def write(self, what: str, passed: bool, detail: str) -> None:
        line = {"version": self.version, "call": what, "passed": passed, "detail": detail}
        with self.results.open("a") as out:
            out.write(json.dumps(line) + "\n")


def equal(found: Any, expected: Any, what: str) -> None:
    """An assertion that says both values, since these scripts run without pytest."""
    if found != expected:
        raise AssertionError(f"{what}: {found!r}, expected {expected!r}")
