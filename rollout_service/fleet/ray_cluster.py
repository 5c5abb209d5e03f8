"""Ray cluster: joined or started, without Ray's handler of SIGTERM."""

import logging
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import ray

from rollout_service.engine.hardware import machine_cores
from rollout_service.fleet.member import FleetError


def start_ray(address: str | None, engine_logs: bool) -> None:
    """Join the cluster at `address`, or start one on this machine that ends with this process, whatever clusters run
    here already. Raises FleetError when there is no cluster at `address`, and when Ray cannot write where it must.

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
        try:
            ray.init(address="local", num_cpus=machine_cores(), **own, **quiet)
        except OSError as error:
            raise FleetError(f"Ray cannot start here: {error}; {_advice(error)}") from error
    signal.signal(signal.SIGTERM, on_sigterm)


def _advice(error: OSError) -> str:
    if "AF_UNIX" in str(error):  # the name of a socket has room for 107 bytes
        return f"its sockets are under {tempfile.gettempdir()}: set RAY_TMPDIR to a folder with a short path, as /tmp"
    return (
        f"it writes to the home folder (HOME, {Path.home()}) and to that of temporary files (RAY_TMPDIR or TMPDIR, "
        f"{tempfile.gettempdir()}): both must be folders that can be written"
    )
