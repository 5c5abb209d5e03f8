"""The quick start works as it is written: its commands and programs, in their order, in a folder of their own."""

import contextlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from engines import ROOT, launched

WRITTEN = "http://127.0.0.1:8000"
"""where the page's service listens; the test's takes a free port"""
SKIPPED = ("make venv", "git clone", "cd ", "source ")
"""what has been done where a test runs"""
LAUNCH = "rollout-service launch "


def test_the_quick_start_runs_as_it_is_written(tmp_path):
    (tmp_path / "deploy").symlink_to(ROOT / "deploy")
    url, environment = WRITTEN, {k: v for k, v in os.environ.items() if k not in ("VLLM_PLUGINS", "OMP_NUM_THREADS")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    page = (ROOT / "docs" / "quick-start.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) > 5
    with contextlib.ExitStack() as stack:
        for language, block in blocks:
            text = block.replace("\\\n", "").replace(WRITTEN, url)
            lines = [line for line in text.splitlines() if not line.startswith(SKIPPED)]
            if lines and lines[0].startswith(LAUNCH):
                url, _ = stack.enter_context(launched(*shlex.split(lines.pop(0), comments=True)[2:]))
            program = ["bash", "-euc"] if language == "sh" else [sys.executable, "-c"]
            done = subprocess.run(
                [*program, "\n".join(lines)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        assert url != WRITTEN, "the page launches no service"
