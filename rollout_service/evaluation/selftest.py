"""`rollout-service selftest`: does this machine sample, verify drafts and take new weights rightly?

for each drafter:   start one engine, check it (selftest_engine.py), stop it
print a table that can go into a bug report; exit with 1 when a check fails
"""

import asyncio
import json
import sys
import time
from importlib.metadata import version
from typing import Any

import ray
from rich.console import Console
from rich.table import Table

from drafters.files.durable import check_folder
from drafters.registry import DrafterConfig
from rollout_service.engine.hardware import resolve_device
from rollout_service.evaluation.arms import fetch_models
from rollout_service.evaluation.exact_policy import Recomputation
from rollout_service.evaluation.machine import machine
from rollout_service.evaluation.running import progress, report_console
from rollout_service.evaluation.selftest_checks import Check
from rollout_service.evaluation.selftest_config import SelftestConfig
from rollout_service.evaluation.selftest_engine import CheckedEngine, check_engine
from rollout_service.fleet.engine_lives import REPORTED
from rollout_service.fleet.member import FleetError
from rollout_service.fleet.resources import check_machine


def selftest(config: SelftestConfig) -> list[Check]:
    """Check, print, and write `config.output`. Exits with 1 when a check fails, and when none could be made."""
    console, began = report_console(), time.monotonic()
    try:
        if config.output is not None:
            check_folder(config.output.parent, "output")
            if config.output.is_dir():
                raise ValueError(f"output: {config.output} is a folder; give a file")
        device = resolve_device(config.engine.device)
        check_machine(config.service(DrafterConfig()), device, turns=1)
        checks = asyncio.run(check_all(config, console))
    except (FleetError, ValueError, OSError) as error:
        sys.exit(f"rollout-service selftest: {error}")
    except KeyboardInterrupt:
        sys.exit("rollout-service selftest: interrupted; nothing was written")
    finally:
        ray.shutdown()
    write_report(checks, about(config, device, time.monotonic() - began), config, console)
    if not all(check.passed for check in checks):
        sys.exit(1)
    return checks


async def check_all(config: SelftestConfig, console: Console) -> list[Check]:
    """All drafters are looked at before the first engine starts. Raises ValueError when one does not fit the policy."""
    drafters = config.checked()
    policy = Recomputation(fetch_models(config.model, drafters, resolve_device(config.engine.device)))
    engines = [CheckedEngine(config, drafter, policy) for drafter in drafters]
    checks: list[Check] = []
    with progress(console) as bar:
        for engine in engines:
            checks += await check_engine(engine, bar)
    return checks


def about(config: SelftestConfig, device: str, seconds: float) -> dict[str, Any]:
    """What a reader of the table must know to judge it."""
    return {
        "rollout_service": version("rollout-service"),
        **machine(device),
        "model": config.model,
        "dtype": config.engine.dtype,
        "eager": bool(config.engine.enforce_eager) or device == "cpu",
        "replaced": sorted(REPORTED),
        "seconds": round(seconds),
    }


def write_report(checks: list[Check], about: dict[str, Any], config: SelftestConfig, console: Console) -> None:
    console.print(table(checks, about))
    wrong = sum(not check.passed for check in checks)
    if wrong:
        console.print(f"[bold red]{wrong} of {len(checks)} checks fail[/]: put this table into the bug report.")
    else:
        console.print(f"All {len(checks)} checks pass.")
    if config.output is not None:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        report = about | {"checks": [check.model_dump() for check in checks]}
        config.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        console.print(f"written to {config.output}", soft_wrap=True)


def table(checks: list[Check], about: dict[str, Any]) -> Table:
    described = "\n".join(f"{name}: {shown(value)}" for name, value in about.items())
    result = Table(title=f"rollout-service selftest\n{described}", title_justify="left", padding=(0, 1), box=None)
    for column in ("drafter", "check", "figures", "limits", "verdict"):
        result.add_column(column, overflow="fold")
    for check in checks:
        verdict = "pass" if check.passed else "FAIL"
        row = check.drafter, check.check, check.figures, check.limits, verdict
        result.add_row(*row, style=None if check.passed else "red")
    return result


def shown(value: Any) -> str:
    """Functions of vLLM without their modules."""
    return ", ".join(name.rpartition(".")[2] for name in value) or "nothing" if isinstance(value, list) else str(value)
