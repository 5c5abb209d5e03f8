"""Ray, joined or started, without its hold on SIGTERM."""

import logging
import signal
from typing import Any

import ray

from rollout_service.hardware import machine_cores


def start_ray(address: str | None, engine_logs: bool) -> None:
    """Join the cluster at `address`, or start one on this machine that ends with this process.

    Who is told to stop decides how: Ray's own handlers of SIGTERM end the process wherever it is, and Ray's agents then
    live on for a minute. The one in Python is not installed; the native one, which prints a trace, loses its place."""
    on_sigterm = signal.getsignal(signal.SIGTERM)
    ray._private.utils.set_sigterm_handler = lambda handler: None
    quiet: dict[str, Any] = {"log_to_driver": engine_logs, "logging_level": logging.ERROR}
    if address is not None:
        ray.init(address=address, **quiet)
    else:
        # Workers that Ray starts before they are asked for are none of ours, which have an environment of their own.
        config = {"prestart_worker_first_driver": False}
        own: dict[str, Any] = {"include_dashboard": False, "object_store_memory": 512 << 20, "_system_config": config}
        ray.init(num_cpus=machine_cores(), **own, **quiet)
    signal.signal(signal.SIGTERM, on_sigterm)
