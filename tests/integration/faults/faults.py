"""Faults of a running service or trainer. Each one also does what a person would do afterwards: start it again."""

import contextlib
import random
import socket
import threading
import time
from collections import Counter

import httpx
import psutil
from engines import wait_until
from nodes import Nodes
from service import Service, Trainer, command_line

from rollout_service.client import RolloutClient, RolloutError
from rollout_service.protocol import GroupRequest, PromptsRequest, Sampling

RECOVERY = 150.0
"""seconds within which the run must go on after a fault"""


class Faults:
    def __init__(self, service: Service, trainer: Trainer, seed: int):
        self.service, self.trainer, self.random = service, trainer, random.Random(seed)
        self.done: Counter[str] = Counter()
        self.kinds = {
            "engine": self.engine,
            "front": self.front,
            "trainer": self.trainer_killed,
            "push": self.cut_push,
            "disk": self.full_disk,
        }

    def inflict(self, kind: str) -> None:
        """Cause one fault. Returns when the run has finished another step."""
        self.kinds[kind]()
        self.done[kind] += 1
        before = self.trainer.steps()
        wait_until(lambda: self._went_on(before), RECOVERY, f"the run goes on after {kind}")

    def _went_on(self, before: int) -> bool:
        assert self.trainer.is_alive, self.trainer.log.read_text()[-3000:]
        assert self.service.is_alive, self.service.log.read_text()[-3000:]
        return self.trainer.steps() > before

    def engine(self) -> None:
        wait_until(lambda: self.service.engine() is not None, RECOVERY, "an engine to kill")
        victim = self.service.engine()
        assert victim is not None
        victim.kill()

    def front(self) -> None:
        self.service.kill()
        self.service.start()

    def trainer_killed(self) -> None:
        self.trainer.kill()
        self.trainer.start()

    def cut_push(self) -> None:
        """A push of a far higher version, whose connection ends in the middle of the body."""
        with RolloutClient(self.service.url) as client:
            policy = client.weights().policy
        run = f"&run={policy.run}" if policy.run else ""  # in the trainer's name: any other is refused before its body
        kept = next(self.service.state.glob("weights/policy-*.safetensors")).read_bytes()
        with socket.create_connection(("127.0.0.1", self.service.port)) as connection:
            head = f"POST /v1/weights/policy?version={policy.version + 1000}{run} HTTP/1.1\r\nHost: localhost\r\n"
            connection.sendall(f"{head}Content-Length: {len(kept)}\r\n\r\n".encode())
            connection.sendall(kept[: self.random.randrange(len(kept))])

    def full_disk(self) -> None:
        """Another client fills the queue's quota, and removes its groups after a while."""
        filler = f"filler-{self.random.random()}"
        with RolloutClient(self.service.url) as client:
            refusal = self._fill(client, filler)
            assert refusal is not None, "the disk never became full"
            assert refusal.status == 507, refusal
            time.sleep(self.random.uniform(0.5, 2.0))
            client.cancel_prompts(filler)

    def _fill(self, client: RolloutClient, run: str) -> RolloutError | None:
        for number in range(1000):
            blob = {"blob": "x" * 60_000}
            group = GroupRequest(id=f"{number}", prompt_token_ids=[5], sampling=Sampling(max_tokens=1), metadata=blob)
            try:
                client.send_prompts(PromptsRequest(groups=[group], run=run, priority=-1))
            except RolloutError as error:
                return error
        return None


class NodeFaults(Faults):
    """Faults of a service whose engines are on nodes of their own. The nodes are supervised (nodes.py)."""

    LONGEST = 15.0
    """seconds; some faults end before anybody notices, and some after Ray has given the node up"""

    def __init__(self, service: Service, trainer: Trainer, cluster: Nodes, seed: int):
        super().__init__(service, trainer, seed)
        self.cluster = cluster
        self.kinds |= {"node": self.node, "frozen": self.frozen, "cut off": self.cut_off, "head": self.head}

    def engine(self) -> None:
        def engines() -> list[psutil.Process]:
            processes = [process for worker in self.cluster.workers for process in worker.processes()]
            return [process for process in processes if "EngineCore" in " ".join(command_line(process))]

        wait_until(lambda: bool(engines()), RECOVERY, "an engine to kill")
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            self.random.choice(engines()).kill()

    def node(self) -> None:
        self.random.choice(self.cluster.workers).kill()

    def frozen(self) -> None:
        node = self.random.choice(self.cluster.workers)
        node.freeze()
        time.sleep(self.random.uniform(1.0, self.LONGEST))
        node.thaw()

    def cut_off(self) -> None:
        node = self.random.choice(self.cluster.workers)
        node.cut_off()
        time.sleep(self.random.uniform(1.0, self.LONGEST))
        node.connect()

    def head(self) -> None:
        self.cluster.head.kill()
        self.service.kill()
        self.cluster.restart_head()
        self.service.start()


class Versions(threading.Thread):
    """Keeps asking for the version in service. `seen` has every change."""

    def __init__(self, url: str):
        super().__init__(daemon=True)
        self.url, self.seen = url, [0]
        self.stopping = threading.Event()

    def run(self) -> None:
        while not self.stopping.wait(0.3):
            with contextlib.suppress(httpx.TransportError, RolloutError), RolloutClient(self.url) as client:
                version = client.weights().policy.version
                if version != self.seen[-1]:
                    self.seen.append(version)

    def stop(self) -> None:
        self.stopping.set()
        self.join()
