"""`rollout-service launch`: the fleet and its HTTP front in one process, from the first check to the last cleanup."""

import asyncio
import contextlib
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial

import ray
import uvicorn
from rich.console import Console

from rollout_service.bearer_token import ADMIN_VARIABLE, NEEDS_TOKEN
from rollout_service.config import ServiceConfig
from rollout_service.fleet.fleet import Fleet
from rollout_service.fleet.member import FleetError
from rollout_service.http.app import load_tokenizer, make_app
from rollout_service.http.app import stop as stop_requests
from rollout_service.http.outermost import outermost
from rollout_service.http.starting import Starting
from rollout_service.http.timed_connection import TimedConnection
from rollout_service.queue.background import BackgroundGeneration
from rollout_service.queue.batch_queue import BatchQueue

GRACE = 5
"""seconds that running requests have to end once the service is told to stop"""
KEPT_ALIVE = 75
"""seconds that an idle connection stays open: longer than clients keep theirs (httpx 5, aiohttp 15), or a request would
now and then go to a connection that has just been closed"""


def launch(config: ServiceConfig) -> None:
    """Serve until SIGINT or SIGTERM, then end everything that was started. Exits with 1 when it cannot start."""
    console = Console(stderr=True)
    if config.token is None and os.environ.get(ADMIN_VARIABLE):
        sys.exit(f"rollout-service launch: {ADMIN_VARIABLE}: {NEEDS_TOKEN}")
    try:
        listener = socket.create_server((config.host, config.port), family=_family(config.host))
    except OSError as error:
        where = url_of(config.tls.scheme, config.host, config.port)
        message = f"cannot listen on {where}: {error.strerror}; choose another host or port"
        sys.exit(f"rollout-service launch: host, port: {message}")
    allow_connections()
    starting = Starting(listener, partial(outermost, config=config), config.tls)
    starting.start()
    try:
        asyncio.run(_serve(config, listener, starting, console))
    except asyncio.CancelledError:
        pass
    except (FleetError, ValueError, OSError) as error:
        sys.exit(f"rollout-service launch: {error}")
    finally:
        starting.end()
        listener.close()
        ray.shutdown()
    console.print("Stopped.")


def allow_connections() -> None:
    """Let this process have as many open files as it may: a request to vLLM's routes takes two, and shells often start
    programs with a limit of 1024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def url_of(scheme: str, host: str, port: int) -> str:
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn without its own signal handlers, which would raise the signal again after the server has stopped."""

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        return contextlib.nullcontext()


async def _serve(config: ServiceConfig, listener: socket.socket, starting: Starting, console: Console) -> None:
    main = asyncio.current_task()
    assert main is not None
    stop: Callable[[], object] = main.cancel
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, lambda: stop())
    fleet = Fleet(config)
    queue: BatchQueue | None = None
    background: BackgroundGeneration | None = None
    try:
        queue = BatchQueue(fleet.state.queue if fleet.state else None, config.queue.capacity, config.queue.disk_mib)
        what = f"{config.served_name} on {fleet.device}, drafter {config.drafter.kind}"
        with console.status(f"Starting {config.engines} engine(s): {what}") as status:
            fleet.on_started = lambda i: status.update(f"{what}: engine {i} is in service")
            loading = asyncio.to_thread(load_tokenizer, fleet.folder, config.openai.chat_template)
            tokenizer, _ = await asyncio.gather(loading, fleet.start())
        app = make_app(fleet, tokenizer, queue)
        background = app.state.background
        background.start()
        settings = uvicorn.Config(
            app, http=TimedConnection, log_level="warning", timeout_graceful_shutdown=GRACE,
            timeout_keep_alive=KEPT_ALIVE, lifespan="off", ssl_certfile=config.tls.certificate,
            ssl_keyfile=config.tls.key,
        )  # fmt: skip
        server, stopping = Server(settings), list[asyncio.Task[None]]()

        def end() -> None:
            stopping.append(asyncio.create_task(stop_requests(app)))
            server.should_exit = True

        stop = end
        starting.end()
        url = url_of(config.tls.scheme, *listener.getsockname()[:2])
        console.print(
            f"Serving [bold]{config.served_name}[/] with {len(fleet.members)} engine(s), drafter "
            f"[bold]{config.drafter.kind}[/], at [bold]{url}[/] (documentation: /docs). Ctrl-C stops it."
        )
        await server.serve([listener])
    finally:
        if fleet.members:
            console.print("Stopping the engines ...")
        if background is not None:
            await background.stop()
        if queue is not None:
            queue.close()
        await fleet.stop()
