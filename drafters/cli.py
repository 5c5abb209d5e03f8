"""The command `drafters`: train a drafter, describe a checkpoint, or compare formats of numbers."""

import argparse
import signal
import sys
from collections.abc import Callable

from drafters.settings import read_command_line


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="drafters", description="Drafters for speculative decoding.", epilog="Each command has its own --help."
    )
    commands: dict[str, Callable[[list[str]], int]] = {"train": train, "inspect": inspect, "formats": formats}
    parser.add_argument(
        "command",
        choices=commands,
        metavar="command",
        help="train: train a drafter on rollouts or other text; inspect: describe a checkpoint; formats: compare "
        "formats of numbers for drafters",
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="--config FILE, and flags that override it")
    chosen = parser.parse_args(argv)
    sys.exit(commands[chosen.command](chosen.arguments))


def train(argv: list[str]) -> int:
    """`drafters train`. Returns the exit code: 1 for a system error, 2 for a wrong configuration, 130 for Ctrl-C."""
    from drafters.training.config import TrainDrafterConfig

    config = read_command_line(TrainDrafterConfig, "drafters train", argv)
    # Imported late: --help and errors in the command line appear without the seconds that torch takes to import.
    from drafters.training.command import train_drafter

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as for Ctrl-C: the run leaves a state to resume from
    try:
        train_drafter(config)
    except ValueError as error:
        return _fail("train", str(error), 2)
    except OSError as error:
        return _fail("train", str(error), 1)
    except KeyboardInterrupt:
        return _fail("train", f"interrupted; go on with --resume --out {config.out}", 130)
    return 0


def inspect(argv: list[str]) -> int:
    """`drafters inspect`. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="drafters inspect", description="Describe a checkpoint as a drafter.")
    parser.add_argument("folder", help="a checkpoint's folder or Hugging Face name")
    folder = parser.parse_args(argv).folder
    from drafters.inspect import inspect as inspect_folder

    try:
        inspect_folder(folder)
    except (ValueError, OSError) as error:
        return _fail("inspect", str(error), 2)
    return 0


def formats(argv: list[str]) -> int:
    """`drafters formats`. Returns the exit code, as `train`."""
    from drafters.exploration.config import FormatsConfig

    config = read_command_line(FormatsConfig, "drafters formats", argv)
    from drafters.exploration.command import explore

    try:
        explore(config)
    except ValueError as error:
        return _fail("formats", str(error), 2)
    except OSError as error:
        return _fail("formats", str(error), 1)
    except KeyboardInterrupt:
        return _fail("formats", "interrupted; what was measured is written", 130)
    return 0


def _fail(command: str, message: str, code: int) -> int:
    print(f"drafters {command}: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
