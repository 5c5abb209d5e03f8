"""Part 1: acceptance and speed of every drafter by draft length."""

from functools import partial
from itertools import cycle, islice
from typing import Any

from config import StudyConfig
from engines import engine, generate, measured
from kept import kept
from rich.progress import track

from drafters.files.text_lines import json_lines
from drafters.registry import DrafterConfig


def lengths(config: StudyConfig) -> list[dict[str, Any]]:
    """One row for each drafter and draft length.

    The baseline is measured again before each drafter, so that both meet the same load of the machine.
    """
    lines = list(json_lines(config.prompts, lambda line: line["prompt"]))
    prompts = list(islice(cycle(lines), config.lengths.completions))
    rows: list[dict[str, Any]] = []
    for drafter in track(config.drafters, description="drafters by draft length"):
        file = config.work / "lengths" / f"{drafter.kind}.json"
        rows += kept(file, partial(_by_length, config, drafter, prompts))
    return rows


def _by_length(config: StudyConfig, drafter: DrafterConfig, prompts: list[str]) -> list[dict[str, Any]]:
    baseline = _row(config, DrafterConfig(), prompts)
    rows = {0: baseline}
    for k in config.lengths.draft_tokens:
        rows[k] = _row(config, drafter.model_copy(update={"draft_tokens": k}), prompts)
    speed = baseline["tokens_per_second"]
    return [
        {"drafter": drafter.kind, "draft_tokens": k, "speedup": row["tokens_per_second"] / speed} | row
        for k, row in rows.items()
    ]


def _row(config: StudyConfig, drafter: DrafterConfig, prompts: list[str]) -> dict[str, Any]:
    sampling = {"max_tokens": config.lengths.response_tokens, "ignore_eos": True}
    with engine(config, config.model, drafter, config.lengths.streams) as llm:
        generate(llm, prompts[: config.lengths.streams], max_tokens=8)  # the first steps compile and allocate
        return measured(*generate(llm, prompts, **sampling))
