"""Bad requests during a training run: all are refused, none hangs or leaves anything, and the run loses nothing.

pytest tests/integration/faults/test_bad_requests.py --bad-requests 10000 -s
"""

import signal
import time

import httpx
from bad_requests import RUN, BadRequests
from engines import wait_until
from record import record_of
from service import Service, Trainer
from test_faults import SMALL_RUN

SEED = 17


def gauges(url):
    """Metrics that must return to zero."""
    lines = httpx.get(f"{url}/metrics", trust_env=False).text.split("\n")
    names = ("rollout_groups_in_flight", "vllm:num_requests_running{", "vllm:num_requests_waiting{")
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(names)}


def test_bad_requests_are_refused_and_leave_nothing_behind_while_a_run_beside_them_loses_nothing(tmp_path, request):
    number = request.config.getoption("--bad-requests")
    service = Service(tmp_path, "--engine.cores", "1", "--drafter.schedule", "fixed")
    service.start()
    trainer = Trainer(tmp_path, service.url, *SMALL_RUN)
    bad = BadRequests(service.url, SEED, number)
    try:
        trainer.start()
        began = time.monotonic()
        bad.run()
        print(
            f"\n{number} bad requests in {time.monotonic() - began:.0f} s, {trainer.steps()} steps: {dict(bad.answers)}"
        )
        assert bad.unexpected == [], "\n".join(bad.unexpected[:20])
        wait_until(lambda: trainer.steps() >= 12, 120, "the run has gone on")
        assert trainer.interrupt() == 128 + signal.SIGTERM, trainer.log.read_text()[-3000:]
        with httpx.Client(base_url=service.url, trust_env=False) as client:
            client.delete("/v1/prompts", params={"run": RUN})
            wait_until(lambda: not any(gauges(service.url).values()), 60, "every gauge returns to zero")
            wait_until(lambda: not client.get("/v1/batches").json()["leases"], 60, "no lease is left")
        assert service.engine() is not None
        assert "died" not in service.log.read_text()
        assert service.stop(signal.SIGTERM, within=40) == 0
    finally:
        for process in (trainer, service):
            if process.is_alive:
                process.process.kill()
    record = record_of(service.state, trainer.output, versions=[], machine="", seed=SEED, nodes=0, faults=[])
    record.check_groups()
