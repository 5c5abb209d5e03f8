"""Ray, joined or started, without its hold on SIGTERM."""

import logging
import os
import signal
from typing import Any

import ray

from rollout_service.hardware import machine_cores
from rollout_service.member import FleetError


def start_ray(address: str | None, engine_logs: bool) -> None:
    """Join the cluster at `address`, or start one on this machine that ends with this process, whatever clusters run
    here already. Raises FleetError when there is no cluster at `address`.

    Who is told to stop decides how: Ray's own handlers of SIGTERM end the process wherever it is, and Ray's agents then
    live on for a minute. The one in Python is not installed; the native one, which prints a trace, loses its place."""
    on_sigterm = signal.getsignal(signal.SIGTERM)
    ray._private.utils.set_sigterm_handler = lambda handler: None
    quiet: dict[str, Any] = {"log_to_driver": engine_logs, "logging_level": logging.ERROR}
    if address is not None:
        try:
            ray.init(address=address, **quiet)
        except (OSError, ValueError, RuntimeError) as error:
            raise FleetError(
                f"ray_address: cannot join a Ray cluster at {address}: {error}; leave ray_address out to start one here"
            ) from error
    else:
        # Workers that Ray starts before they are asked for are none of ours, which have an environment of their own.
        config = {"prestart_worker_first_driver": False}
        own: dict[str, Any] = {"include_dashboard": False, "object_store_memory": 512 << 20, "_system_config": config}
        os.environ.pop("RAY_ADDRESS", None)  # names another cluster, also to every process that is started from here
        ray.init(address="local", num_cpus=machine_cores(), **own, **quiet)
    signal.signal(signal.SIGTERM, on_sigterm)
