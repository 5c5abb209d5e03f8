"""The command `rl-loop`."""

import argparse
import sys
from collections.abc import Callable

from drafters.settings import read_command_line
from rl_loop.config import TrainConfig

SIGNALLED = 128
"""exit code of a command that a signal ended: this plus the signal's number"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="rl-loop",
        description="Reinforcement learning against a rollout service.",
        epilog="Each command has its own --help.",
    )
    commands: dict[str, Callable[[list[str]], int]] = {"train": train}
    parser.add_argument(
        "command", choices=commands, metavar="command", help="train: synchronous or asynchronous training, by --mode"
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="--config FILE, and flags that override it")
    chosen = parser.parse_args(argv)
    sys.exit(commands[chosen.command](chosen.arguments))


def train(argv: list[str]) -> int:
    """`rl-loop train`. Returns the exit code: 2 for a wrong configuration, 1 for any other failure, and SIGNALLED plus
    the signal's number after a signal."""
    config = read_command_line(TrainConfig, "rl-loop train", argv)
    # These imports follow the reading of the command line, so that --help and its errors come at once.
    import httpx

    from drafters.files.disk_space import NoRoom, is_full
    from rl_loop.custom_function import CustomFunctionError
    from rl_loop.loops.collapsed_experts import CollapsedExperts
    from rl_loop.loops.interruption import Interrupted, Interruption
    from rl_loop.loops.losslessness_alarm import NotLossless
    from rl_loop.loops.ownership import ForeignWeights
    from rl_loop.loops.pulling import EveryGroupFailed
    from rl_loop.loops.recording import ReplayError
    from rl_loop.preflight import PreflightError
    from rl_loop.tasks import TaskError
    from rl_loop.tasks.rewards import RewardsFailed
    from rl_loop.training import run_training
    from rollout_service.client import EndpointError, RolloutError

    try:
        with Interruption() as interruption:
            run_training(config, interruption)
    except Interrupted as interrupted:
        return _fail(f"ended by {interrupted}", SIGNALLED + interrupted.signum)
    except (TaskError, CustomFunctionError) as error:
        return _fail(str(error), 2)
    except (
        PreflightError, ReplayError, NotLossless, CollapsedExperts, EveryGroupFailed, RewardsFailed, ForeignWeights,
    ) as error:  # fmt: skip
        return _fail(str(error), 1)
    except EndpointError as error:
        return _fail(f"endpoint: {error}", 2)
    except RolloutError as error:
        return _fail(f"{config.endpoint} answered {error}", 1)
    except httpx.TransportError as error:
        return _fail(f"{config.endpoint}: {str(error) or type(error).__name__}", 1)
    except OSError as error:
        where = f"{config.output}: " if is_full(error) and not isinstance(error, NoRoom) else ""
        return _fail(f"{where}{error}", 1)
    return 0


def _fail(message: str, code: int) -> int:
    print(f"rl-loop train: {message}", file=sys.stderr)
    return code
