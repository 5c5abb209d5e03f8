"""Ray cluster: joined or started, without Ray's handler of SIGTERM."""

import logging
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError

from rollout_service.engine.hardware import machine_cores
from rollout_service.fleet.member import FleetError


def start_ray(address: str | None, engine_logs: bool) -> None:
    """Join the cluster at `address`. Without an address, start a cluster on this machine that ends with this process,
    whatever clusters run here already. Raises FleetError when there is no cluster at `address`, and when Ray cannot
    write where it must.

    This process handles SIGTERM itself. Ray's handlers would end it at any point, and Ray's agents would then live on
    for a minute. So Ray's Python handler is not installed. Its native handler, which prints a trace, is replaced."""
    on_sigterm = signal.getsignal(signal.SIGTERM)
    ray._private.utils.set_sigterm_handler = lambda handler: None
    quiet: dict[str, Any] = {"log_to_driver": engine_logs, "logging_level": logging.ERROR}
    if address is not None:
        try:
            ray.init(address=address, **quiet)
        except (OSError, ValueError, RuntimeError, AuthenticationError) as error:
            raise FleetError(
                f"ray_address: cannot join a Ray cluster at {address}: {error}; leave ray_address out to start one "
                "here, or, if that one asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to its file"
            ) from error
    else:
        # Workers that Ray starts in advance are of no use: those of the engines have an environment of their own.
        # Ray runs workers at niceness 15. One busy process beside them would take nearly a whole core from the engines,
        # whose threads wait for each other in every operation.
        config: dict[str, Any] = {"prestart_worker_first_driver": False, "worker_niceness": 0}
        own: dict[str, Any] = {"include_dashboard": False, "object_store_memory": 512 << 20, "_system_config": config}
        os.environ.pop("RAY_ADDRESS", None)  # it names another cluster, to every child process as well
        try:
            ray.init(address="local", num_cpus=machine_cores(), **own, **quiet)
        except OSError as error:
            raise FleetError(f"Ray cannot start here: {error}; {_advice(error)}") from error
    signal.signal(signal.SIGTERM, on_sigterm)


def _advice(error: OSError) -> str:
    if "AF_UNIX" in str(error):  # the name of a socket has room for 107 bytes
        return f"its sockets are under {tempfile.gettempdir()}: set RAY_TMPDIR to a folder with a short path, like /tmp"
    return (
        f"it writes to the home folder (HOME, {Path.home()}) and to the folder of temporary files (RAY_TMPDIR or "
        f"TMPDIR, {tempfile.gettempdir()}): make both writable"
    )
