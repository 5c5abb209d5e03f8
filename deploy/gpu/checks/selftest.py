"""Stage `selftest`: the checks of `rollout-service selftest` on one engine of the demo, in this process."""

import asyncio

from common import RESPONSES, say
from configured import service_config
from rich.console import Console

from rollout_service.evaluation.selftest import check_all
from rollout_service.evaluation.selftest_config import SelftestConfig

RESPONSE_TOKENS = 8
"""tokens of a response of a self-test"""


def run(kind: str, dtype: str, verification: str, graphs: str) -> None:
    engine = {"dtype": dtype, "enforce_eager": graphs == "eager"}
    service = service_config(kind, drafter={"verification": verification} if kind != "none" else {}, engine=engine)
    tokens = max(1024, RESPONSES * RESPONSE_TOKENS)
    config = SelftestConfig(engine=service.engine, drafter=service.drafter, drafters=[kind], tokens=tokens)
    for check in asyncio.run(check_all(config, Console(quiet=True))):
        say(kind, check.check, "pass:" if check.passed else "FAIL:", check.figures, "| limits:", check.limits)
