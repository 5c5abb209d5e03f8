"""The pool of reward processes: what a bad reward costs, and that no process is left."""

import os
import time

import psutil
import pytest

from rl_loop.tasks import TaskProblem
from rl_loop.tasks.rewards_pool import RewardsPool

PROBLEM = TaskProblem(entry={}, prompt="p")


class Moody:
    """The response decides the reward: a number is its own reward."""

    def reward(self, problem, response):
        if response == "hang":
            while True:
                pass
        if response == "exit":
            os._exit(3)
        return float(response)


@pytest.fixture(scope="module")
def pool():
    with RewardsPool(Moody, processes=2, timeout=1.0) as pool:
        yield pool
        workers = [worker.process.pid for worker in pool.workers]
        assert workers
    assert not [pid for pid in workers if psutil.pid_exists(pid)]


def rewards(pool, *responses):
    return [future.result(30) for future in pool.submit(PROBLEM, responses)]


def test_rewards_come_back_in_the_order_of_the_responses(pool):
    assert rewards(pool, *map(str, range(20))) == [float(i) for i in range(20)]


def test_a_reward_that_hangs_raises_or_ends_its_process_costs_only_its_completion(pool, caplog):
    began = time.monotonic()
    assert rewards(pool, "1", "hang", "not a number", "exit", "2") == [1.0, None, None, None, 2.0]
    assert time.monotonic() - began < 25.0
    assert {"took over", "ValueError", "ended its process"} <= {
        part for part in ("took over", "ValueError", "ended its process") if part in caplog.text
    }
    assert rewards(pool, "3", "4") == [3.0, 4.0]
