"""`make bench`: measures the speed of the service and of its parts against goals. Writes JSON and a table.

    python deploy/bench/bench.py [--config deploy/bench/quick.toml] [--only rollout_speed] [--drafters mtp]

Each item writes OUTPUT/ITEM.json when it is done. The table shows every item whose file is there.
"""

import signal
import sys
from collections.abc import Callable
from typing import Any

from bench_config import BenchConfig
from figures import Figure, write_item, write_table
from learner import learner
from padding import ensure_padded
from rollout_batch import rollout_batch
from rollout_speed import rollout_speed
from routes import routes
from service import service
from start import start
from step import step
from weights import weights

from drafters.settings import read_command_line
from rollout_service.engine.hardware import resolve_device
from rollout_service.evaluation.calibrate import machine

MEASURE: dict[str, Callable[[BenchConfig], tuple[list[Figure], Any]]] = {
    "rollout_speed": rollout_speed,
    "rollout_batch": rollout_batch,
    "service": service,
    "routes": routes,
    "weights": weights,
    "learner": learner,
    "start": start,
    "step": step,
}


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as for Ctrl-C: ends every process that was started
    config = read_command_line(BenchConfig, "bench", sys.argv[1:])
    ensure_padded(config.source, config.padded, config.shape)
    here, drafts = machine(resolve_device(config.engine.device)), {"drafts": config.draft_sampling}
    for item in config.only:
        figures, details = MEASURE[item](config)
        measured_on = here if item in ("learner", "start") else here | drafts
        write_item(config.output, item, figures, measured_on, details)
    print(write_table(config.output))


if __name__ == "__main__":
    main()
