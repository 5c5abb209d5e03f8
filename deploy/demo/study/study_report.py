"""Report of the study: tables, text and plots from its JSON files."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from config import StudyConfig

LARGE = """The large run to compare with has a policy of 8 billion parameters and vLLM on GPUs (arXiv 2604.26779).
Speeds here and below are relative to no drafter.

| large run | acceptance length | speed |
| --- | ---: | ---: |
| n-gram | 2.47 | 0.7x |
| EAGLE-3 with 3 draft tokens | 3.32 | 1.8x |
| EAGLE-3 with 5 draft tokens | 4.35 | 1.4x |
| EAGLE-3 with 7 draft tokens | 5.06 | 1.2x |
| EAGLE-3 initialised on other text | 2.88 | 1.5x |
| the same, trained online | 3.04 | 1.6x |
| EAGLE-3 initialised on its own domain | 3.32 | 1.8x |
| the same, trained online | 3.29 | 1.8x |
"""


def write_report(config: StudyConfig) -> None:
    """Writes README.md and plots for the parts that have a JSON file."""
    parts: dict[str, dict[str, Any]] = {}
    for name in ("lengths", "initialisation", "moving"):
        file = config.output / f"{name}.json"
        if file.is_file():
            parts[name] = json.loads(file.read_text(encoding="utf-8"))
    where = next(iter(parts.values()))
    versions = "".join(f", {name} {number}" for name, number in where["versions"].items())
    text = [
        "# Study: drafters and a policy that moves\n",
        f"`make study` (deploy/demo/study) wrote this page. It ran on {where['machine']}{versions}, with the policy "
        f"`{config.model}`.\n",
        LARGE,
    ]
    if "lengths" in parts:
        text += lengths_text(config, parts["lengths"]["rows"])
    if "initialisation" in parts:
        text += initialisation_text(config, parts["initialisation"]["rows"])
    if "moving" in parts:
        text += moving_text(config, parts["moving"]["rows"])
    (config.output / "README.md").write_text("\n".join(text), encoding="utf-8")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def lengths_text(config: StudyConfig, rows: list[dict[str, Any]]) -> list[str]:
    plot_lengths(config, rows)
    drafting = [row for row in rows if row["draft_tokens"]]
    kinds = list(dict.fromkeys(row["drafter"] for row in drafting))
    ks = sorted({row["draft_tokens"] for row in drafting})

    def cell(kind: str, k: int) -> str:
        row = next(r for r in drafting if (r["drafter"], r["draft_tokens"]) == (kind, k))
        return f"{row['acceptance_length']:.2f} / {row['speedup']:.2f}x"

    said = []
    for kind in kinds:
        of_kind = [row for row in drafting if row["drafter"] == kind]
        best = max(of_kind, key=lambda row: row["speedup"])
        longest = max(of_kind, key=lambda row: row["acceptance_length"])
        said.append(
            f"- {kind}: fastest with {best['draft_tokens']} draft token{'s' * (best['draft_tokens'] > 1)} "
            f"({best['speedup']:.2f}x); longest acceptance with {longest['draft_tokens']} "
            f"({longest['acceptance_length']:.2f}, {longest['speedup']:.2f}x)."
        )
    return [
        "## Draft length\n",
        f"{lengths_unlike(drafting)}\n",
        f"The table has acceptance length / speed, with {config.lengths.streams} streams and "
        f"{config.lengths.completions} completions of {config.lengths.response_tokens} tokens at temperature 1.\n",
        table(["drafter", *(f"k = {k}" for k in ks)], [[kind, *(cell(kind, k) for k in ks)] for kind in kinds]),
        "![acceptance and speed by draft length](lengths.png)\n",
        *said,
        "",
    ]


def initialisation_text(config: StudyConfig, rows: list[dict[str, Any]]) -> list[str]:
    part = config.initialisation
    shown = [
        [
            row["drafter"],
            row["trained_on"],
            f"{row['acceptance_length']:.2f}",
            " ".join(f"{share:.2f}" for share in row["acceptance_by_position"]),
        ]
        for row in rows
    ]
    by = {(row["drafter"], row["trained_on"]): row["acceptance_length"] for row in rows}
    gaps = ", ".join(
        f"{kind} {by[kind, 'own rollouts'] - by[kind, 'other text']:+.2f}" for kind in dict.fromkeys(k for k, _ in by)
    )
    return [
        "## Initialisation\n",
        f"{initialisation_unlike(by)} Acceptance length with own rollouts, minus that with other text: {gaps}.\n",
        f"New drafters were trained for {part.training.steps} steps of {part.training.batch_size} samples, with the "
        f"same number of texts from either source, and measured with {part.draft_tokens} draft tokens.\n",
        table(["drafter", "trained on", "acceptance length", "by position"], shown),
        from_scratch(by),
        "",
    ]


def moving_text(config: StudyConfig, rows: list[dict[str, Any]]) -> list[str]:
    plot_moving(config, rows)
    shown = [
        [
            row["arm"],
            f"{start(row):.2f}",
            f"{end(row):.2f}",
            f"{end(row) / start(row) - 1:+.1%}",
            f"{min(row['acceptance_length']):.2f}",
            f"{row['trained_steps']} of {len(row['reward'])}",
            f"{row['rollout_seconds']:.0f} s",
            f"{row['verifications_per_token']:.3f}",
            f"{row['drafter_training_seconds']:.0f} s",
            f"{row['reward'][0]:.2f} to {row['reward'][-1]:.2f}",
            f"{row['z']:+.2f}",
        ]
        for row in rows
    ]
    header = ["drafter", "start", "end", "change", "lowest", "trained steps", "rollout time",
              "verifications per token", "training time", "reward", "z"]  # fmt: skip
    train = config.moving.train
    changes = ", ".join(f"{row['arm']} {end(row) / start(row) - 1:+.1%}" for row in rows)
    return [
        "## A policy that moves far\n",
        f"Acceptance length at the end, relative to the start: {changes}. {moving_unlike(rows)}\n",
        f"Each arm has {len(rows[0]['reward'])} steps of GRPO with learning rate {train.get('learning_rate')}, and the "
        f"drafter {config.moving.kind} with 3 draft tokens. All arms begin with the same policy, drafter and seeds. "
        "Start, end and lowest are acceptance lengths; start and end are means over three steps. z says whether the "
        "samples follow the policy: |z| is below 4 if they do.\n",
        table(header, shown),
        "![acceptance and reward by step](moving.png)\n",
        *(f"- {arm_text(row)}" for row in rows),
        "",
    ]


def lengths_unlike(drafting: list[dict[str, Any]]) -> str:
    """The finding on draft lengths, compared with the large run, which gains 1.8x at k = 3 and less at 5 and 7."""
    best = max(drafting, key=lambda row: row["speedup"])
    longest = max(row["draft_tokens"] for row in drafting)
    fastest = f"{best['drafter']} with {best['draft_tokens']} draft tokens, {best['speedup']:.2f}x"
    gain = (
        f"Unlike in the large run, no drafter is faster than none (best: {fastest}): a policy of this size costs "
        "little more than its drafter, so a draft costs what it saves."
        if best["speedup"] <= 1.0
        else f"As in the large run, the best drafter is faster than none ({fastest})."
    )
    falls = (
        "As there, the longest draft is not the fastest."
        if best["draft_tokens"] < longest
        else "Unlike there, the longest draft is the fastest."
    )
    return f"{gain} {falls}{ngram_unlike(drafting)}"


def ngram_unlike(drafting: list[dict[str, Any]]) -> str:
    lengths = [row["acceptance_length"] for row in drafting if row["drafter"] == "ngram"]
    if not lengths or max(lengths) > 2.0:
        return ""
    return (
        f" Unlike there (2.47), n-gram drafts are rarely accepted: the acceptance length is at most {max(lengths):.2f}."
    )


def from_scratch(by: dict[tuple[str, str], float]) -> str:
    """The acceptance length of new drafters, relative to the drafters that the study was given."""
    kinds = [kind for kind, source in by if source == "as given"]
    shares = ", ".join(f"{kind} {by[kind, 'own rollouts'] / by[kind, 'as given']:.1%}" for kind in kinds)
    said = "Drafters trained from scratch reach these shares of the given drafters' acceptance length"
    return f"{said}: {shares}." if shares else ""


def initialisation_unlike(by: dict[tuple[str, str], float]) -> str:
    worse = [kind for kind, source in by if source == "other text" and by[kind, source] >= by[kind, "own rollouts"]]
    if worse:
        return f"Unlike in the large run (3.32 against 2.88), own rollouts do not help {' and '.join(worse)}."
    return "As in the large run (3.32 against 2.88), own rollouts help."


def moving_unlike(rows: list[dict[str, Any]]) -> str:
    """Whether training the drafter saved time. In the large run, generation gains with acceptance (1.6x to 1.8x)."""
    frozen, *others = sorted(rows, key=lambda row: row["trained_steps"])
    said = []
    for row in others:
        saved = frozen["rollout_seconds"] - row["rollout_seconds"]
        pays = saved > row["drafter_training_seconds"]
        verdict = (
            "As in the large run, {} training pays" if pays else "Unlike in the large run, {} training does not pay"
        )
        said.append(
            f"{verdict.format(row['arm'])}: rollouts took {abs(saved):.0f} s {'less' if saved > 0 else 'more'} than "
            f"with the frozen drafter, and the drafter's training took {row['drafter_training_seconds']:.0f} s."
        )
    return " ".join(said)


def arm_text(row: dict[str, Any]) -> str:
    lengths, began = row["acceptance_length"], start(row)
    step, least = min(enumerate(lengths, start=1), key=lambda pair: pair[1])
    return (
        f"{row['arm']}: {began:.2f} at the start, {least:.2f} at the lowest ({least / began - 1:+.1%}, step {step}), "
        f"{sum(lengths) / len(lengths):.2f} on average, {lengths[-1]:.2f} in the last step."
    )


def start(row: dict[str, Any]) -> float:
    return sum(row["acceptance_length"][:3]) / 3


def end(row: dict[str, Any]) -> float:
    return sum(row["acceptance_length"][-3:]) / 3


def plot_lengths(config: StudyConfig, rows: list[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    acceptance, speed = figure.subplots(1, 2)
    drafting = [row for row in rows if row["draft_tokens"]]
    for kind in dict.fromkeys(row["drafter"] for row in drafting):
        of_kind = [row for row in drafting if row["drafter"] == kind]
        k = [row["draft_tokens"] for row in of_kind]
        acceptance.plot(k, [row["acceptance_length"] for row in of_kind], marker="o", label=kind)
        speed.plot(k, [row["speedup"] for row in of_kind], marker="o", label=kind)
    acceptance.set_ylabel("acceptance length")
    speed.set_ylabel("speed relative to no drafter")
    speed.axhline(1.0, color="black", linewidth=1)
    for axes in (acceptance, speed):
        axes.set_xlabel("draft tokens")
        axes.grid(alpha=0.3)
    acceptance.legend()
    figure.savefig(config.output / "lengths.png", dpi=120)


def plot_moving(config: StudyConfig, rows: list[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    acceptance, reward = figure.subplots(2, 1, sharex=True)
    for row in rows:
        steps = range(1, len(row["reward"]) + 1)
        (line,) = acceptance.plot(steps, row["acceptance_length"], label=row["arm"])
        versions = row["drafter_version"]
        pushed = [i for i in range(1, len(versions)) if versions[i] != versions[i - 1]]
        acceptance.plot([i + 1 for i in pushed], [row["acceptance_length"][i] for i in pushed], "o",
                        color=line.get_color(), markersize=4)  # fmt: skip
        reward.plot(steps, row["reward"], color=line.get_color(), label=row["arm"])
    acceptance.set_ylabel("acceptance length")
    reward.set_ylabel("mean reward")
    reward.set_xlabel("step (dots: first rollouts of a pushed drafter)")
    acceptance.legend()
    for axes in (acceptance, reward):
        axes.grid(alpha=0.3)
    figure.savefig(config.output / "moving.png", dpi=120)
