"""Run real clients, unmodified, against one service on a CPU, and print what worked. `make test-clients` calls it.

    python tests/clients/run.py                          every client, against a service that it starts and ends
    python tests/clients/run.py --only openai verifiers
    python tests/clients/run.py --endpoint URL           against a service that runs already

The service has the demo's policy with its MTP head as the drafter. What a script and the service print goes to
.clients/logs. Exits with 1 if a call failed.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clients import CLIENTS, Client
from environments import FOLDER, ROOT, clean
from rich.console import Console
from rich.markup import escape
from rich.table import Table

HERE = Path(__file__).resolve().parent
LOGS = FOLDER / "logs"
WORK = FOLDER / "work"
"""where the scripts run, since some clients write files wherever they are"""
LAUNCH = ("launch", "--config", str(HERE / "service.toml"), "--port", "0")


@contextmanager
def service() -> Iterator[str]:
    """The URL of a service that serves. Afterwards it is ended."""
    log = LOGS / "service.log"
    command = [str(Path(sys.executable).parent / "rollout-service"), *LAUNCH]
    with log.open("w") as out, subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                out.write(line)
                if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                    yield found.group()
                    break
            else:
                sys.exit(f"run.py: the service did not start; {log} says why")
        finally:
            process.send_signal(signal.SIGTERM)
            out.write(process.communicate(timeout=60)[1])


def run(client: Client, endpoint: str) -> list[dict]:
    """What the client's script wrote down, and a last line if the script itself failed."""
    name = Path(client.script).stem
    results, log = LOGS / f"{name}.jsonl", LOGS / f"{name}.log"
    results.unlink(missing_ok=True)
    why = ""
    with log.open("w") as out:
        try:
            python = str(client.environment.make()) if client.environment else sys.executable
            command = [python, str(HERE / client.script), endpoint, str(results)]
            environment = clean(os.environ) if client.environment else dict(os.environ)
            code = subprocess.run(
                command, stdout=out, stderr=subprocess.STDOUT, cwd=WORK, env=environment, timeout=client.seconds
            ).returncode
            if code:
                why = f"exit code {code}"
        except subprocess.TimeoutExpired:
            why = f"not done after {client.seconds} s"
        except subprocess.CalledProcessError as error:
            why = f"not installed: {error}"
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    if why or not lines:
        lines.append(
            {"version": "", "call": client.script, "passed": False, "detail": f"{why or 'no call'}; see {log}"}
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="words; clients whose name has one of them")
    parser.add_argument("--endpoint", help="a running service")
    options = parser.parse_args()
    chosen = [c for c in CLIENTS if not options.only or any(w.lower() in c.name.lower() for w in options.only)]
    for folder in (LOGS, WORK):
        folder.mkdir(parents=True, exist_ok=True)
    table, failed, console = Table("client", "version", "call", "result"), 0, Console()
    if not console.is_terminal:
        console.width = 160

    def run_all(endpoint: str) -> None:
        nonlocal failed
        for client in chosen:
            console.print(f"Running {client.name} ...")
            for line in run(client, endpoint):
                failed += not line["passed"]
                result = "ok" if line["passed"] else "[red]failed[/]"
                detail = escape(line["detail"].splitlines()[0][:300]) if line["detail"] else ""
                table.add_row(client.name, line["version"], escape(line["call"]), f"{result} {detail}".strip())

    if options.endpoint:
        run_all(options.endpoint)
    else:
        with service() as endpoint:
            run_all(endpoint)
    console.print(table)
    console.print(f"{table.row_count - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
