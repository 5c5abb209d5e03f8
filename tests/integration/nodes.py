"""Ray nodes on this machine, each with its own network: they can be killed, frozen, and cut off from the others.

The head is in the machine's own network, and so are the front and its clients. Every other node is in a network
namespace. A bridge connects them. `ray start --block` is a node's first process. Like a machine's supervisor, a test
starts a node again that has ended.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

import psutil

BIN = Path(sys.executable).parent
PORT = 6379
JOINS_WITHIN = 60.0
NOTICED = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
}
"""A node that is silent is given up after some ten seconds, and a node ends that has no head for so long. By default
both take a minute."""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def has_networks() -> bool:
    """Whether this process may make networks: as root, with iproute2, in a container with NET_ADMIN and SYS_ADMIN."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"rs{secrets.token_hex(3)}"
    try:
        ip("netns", "add", name)
        ip("netns", "del", name)
        ip("link", "add", name, "type", "bridge")
        ip("link", "del", name)
    except subprocess.CalledProcessError:
        return False
    return True


HAS_NETWORKS = has_networks()


class Network:
    """A bridge with an address for the head, and a namespace for each other node."""

    def __init__(self) -> None:
        number = secrets.randbelow(4096)
        self.bridge, self.prefix = f"rs{number}", f"10.{100 + number // 256}.{number % 256}"
        self.head = f"{self.prefix}.1"
        ip("link", "add", self.bridge, "type", "bridge")
        ip("addr", "add", f"{self.head}/24", "dev", self.bridge)
        ip("link", "set", self.bridge, "up")
        self.spaces: list[str] = []

    def add(self) -> tuple[str, str]:
        """A namespace's name, and its address."""
        number = len(self.spaces) + 2
        space, address = f"{self.bridge}n{number}", f"{self.prefix}.{number}"
        self.spaces.append(space)
        ip("netns", "add", space)
        ip("link", "add", space, "type", "veth", "peer", "name", "eth0", "netns", space)
        ip("link", "set", space, "master", self.bridge, "up")
        ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
        ip("-n", space, "link", "set", "eth0", "up")
        ip("-n", space, "link", "set", "lo", "up")
        return space, address

    def remove(self) -> None:
        for space in self.spaces:
            ip("netns", "del", space)
        ip("link", "del", self.bridge)


class Node:
    def __init__(self, log: Path, head: str, cpus: int, space: str | None = None, address: str | None = None):
        """A worker in the namespace `space` with this address; the head without one."""
        self.log, self.space = log, space
        inside = ["ip", "netns", "exec", space] if space else []
        joins = (
            ["--address", f"{head}:{PORT}"] if space else ["--head", "--port", str(PORT), "--include-dashboard=false"]
        )
        self.command = [
            *inside, str(BIN / "ray"), "start", *joins, "--node-ip-address", address or head, "--num-cpus", str(cpus),
            "--object-store-memory", str(200 << 20), "--disable-usage-stats", "--block",
        ]  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it has joined. Two nodes that start at once would take the same name for their sockets, since
        they share the machine's folder of temporary files."""
        before = self._joined()
        own = {k: v for k, v in os.environ.items() if k not in ("VLLM_PLUGINS", "OMP_NUM_THREADS", "RAY_ADDRESS")}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=own | NOTICED | {"RAY_worker_niceness": "0"}
            )
        deadline = time.monotonic() + JOINS_WITHIN
        while self._joined() == before:
            assert self.is_alive, self.log.read_text()[-2000:]
            assert time.monotonic() < deadline, self.log.read_text()[-2000:]
            time.sleep(0.25)

    def _joined(self) -> int:
        return self.log.read_text().count("Ray runtime started") if self.log.exists() else 0

    def processes(self) -> list[psutil.Process]:
        assert self.process is not None
        with suppress(psutil.NoSuchProcess):
            first = psutil.Process(self.process.pid)
            return [first, *first.children(recursive=True)]
        return []

    def send(self, signum: int) -> None:
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signum)

    def kill(self) -> None:
        """As when the machine loses its power."""
        processes = self.processes()
        self.send(signal.SIGSTOP)  # so that none starts another meanwhile
        self.send(signal.SIGKILL)
        psutil.wait_procs(processes, timeout=10)

    def freeze(self) -> None:
        self.send(signal.SIGSTOP)

    def thaw(self) -> None:
        self.send(signal.SIGCONT)

    def cut_off(self) -> None:
        assert self.space is not None
        ip("link", "set", self.space, "down")

    def connect(self) -> None:
        assert self.space is not None
        ip("link", "set", self.space, "up")

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None


class Nodes:
    """A head without cores for engines, and workers with one core each."""

    def __init__(self, folder: Path, network: Network, workers: int):
        self.network = network
        self.head = Node(folder / "head.log", network.head, cpus=0)
        self.workers = [Node(folder / f"worker-{i}.log", network.head, 1, *network.add()) for i in range(workers)]
        self.address = f"{network.head}:{PORT}"

    def start(self) -> None:
        self.head.start()
        for worker in self.workers:
            worker.start()

    def restart_head(self) -> None:
        """Start the killed head again. Its workers end without it, and here it must wait for that: Ray starts no head
        on a machine with a node of a head of the same address."""
        deadline = time.monotonic() + JOINS_WITHIN
        while any(worker.is_alive for worker in self.workers):
            assert time.monotonic() < deadline, "workers live on without a head"
            time.sleep(0.25)
        for worker in self.workers:
            worker.kill()
        self.head.start()

    def supervise(self) -> None:
        """Start each worker again that has ended, as a machine's supervisor does, unless there is no head. Ray ends a
        node that it has given up."""
        for worker in self.workers:
            if self.head.is_alive and not worker.is_alive:
                worker.start()

    @contextmanager
    def supervised(self) -> Iterator[None]:
        """Within this context, a thread supervises them."""
        ending = threading.Event()

        def keep() -> None:
            while not ending.wait(0.5):
                with suppress(AssertionError):  # the head died while a worker started
                    self.supervise()

        keeper = threading.Thread(target=keep)
        keeper.start()
        try:
            yield
        finally:
            ending.set()
            keeper.join()


@contextmanager
def nodes(folder: Path, workers: int) -> Iterator[Nodes]:
    """A running cluster that asks for Ray's token; this process and those that it starts have it. Afterwards none of
    its processes is left."""
    network = Network()
    cluster = Nodes(folder, network, workers)
    try:
        with mock.patch.dict(os.environ, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32)):
            cluster.start()
            yield cluster
    finally:
        for node in (*cluster.workers, cluster.head):
            if node.process is not None:
                node.kill()
        network.remove()
