"""Part 2: drafters trained on the policy's own rollouts against drafters trained on other text, all else equal."""

import json
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from config import StudyConfig
from engines import engine, generate, measured
from kept import kept

from drafters.files.text_lines import json_lines
from drafters.registry import DrafterConfig, HeadShape, LearnerKind
from drafters.training.command import train_drafter
from drafters.training.config import TrainDrafterConfig
from rl_loop.task_config import TaskConfig
from rl_loop.tasks import TaskProblem, make_task

STREAMS = 32


def initialisation(config: StudyConfig) -> list[dict[str, Any]]:
    """One row for each kind and source of text, and one for each given drafter of these kinds."""
    part = config.initialisation
    lines = list(json_lines(config.prompts, lambda line: line["prompt"]))
    asked = list(islice(cycle(lines), config.lengths.completions))
    rollouts = config.work / "rollouts.jsonl"
    other = part.other_text or _other_text(config)
    write_rollouts(config, rollouts)
    rows = []
    for kind in part.kinds:
        for source, data in (("own rollouts", rollouts), ("other text", other)):
            out = config.work / f"{kind}-{source.replace(' ', '-')}"
            row = kept(config.work / f"{out.name}.json", partial(_trained, config, kind, data, out, asked))
            rows.append({"drafter": kind, "trained_on": source} | row)
        for given in (drafter for drafter in config.drafters if drafter.kind == kind):
            row = kept(config.work / f"{kind}-given.json", partial(_measured, config, config.model, given, asked))
            rows.append({"drafter": kind, "trained_on": "as given"} | row)
    return rows


def write_rollouts(config: StudyConfig, file: Path) -> None:
    """Writes the policy's completions for the training problems of `moving.train.task`, in the service's format.

    The prompts that drafters are measured on are not among these problems, because a drafter can learn the answers to a
    few prompts by heart.
    """
    if file.is_file():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    task = make_task(TaskConfig.model_validate(config.moving.train["task"]))
    problems = [task.prompt("train", index) for index in range(config.initialisation.samples)]
    with engine(config, config.model, DrafterConfig(), STREAMS) as llm:
        tokenizer = llm.get_tokenizer()
        prompts = [problem.prompt or chat(tokenizer, problem) for problem in problems]
        outputs, _ = generate(llm, prompts, max_tokens=config.initialisation.response_tokens)
    with file.open("w", encoding="utf-8") as lines:
        for output in outputs:
            completions = [{"token_ids": list(output.outputs[0].token_ids)}]
            lines.write(json.dumps({"prompt_token_ids": list(output.prompt_token_ids), "completions": completions}))
            lines.write("\n")


def chat(tokenizer: Any, problem: TaskProblem) -> str:
    messages = [message.model_dump() for message in problem.messages or []]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _other_text(config: StudyConfig) -> Path:
    """Writes problems and answers of other tasks, about as many as there are rollouts."""
    import reasoning_gym

    file = config.work / "other.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    names = config.initialisation.other_tasks
    count = -(-config.initialisation.samples // len(names))
    with file.open("w", encoding="utf-8") as lines:
        for name in names:
            for problem in reasoning_gym.create_dataset(name, seed=config.seed, size=count):
                lines.write(json.dumps({"text": f"{problem['question']}\nAnswer: {problem['answer']}"}) + "\n")
    return file


def _training(config: StudyConfig, kind: LearnerKind, data: Path, out: Path) -> TrainDrafterConfig:
    part = config.initialisation
    return TrainDrafterConfig(
        kind=kind,
        policy=config.model,
        data=data,
        out=out,
        head=part.heads.get(kind, HeadShape()),
        training=part.training,
        samples=part.samples,
        max_length=config.engine.max_model_len // 2,
        resume=True,
    )


def _trained(config: StudyConfig, kind: LearnerKind, data: Path, out: Path, asked: list[str]) -> dict[str, Any]:
    if not (out / "config.json").is_file():
        train_drafter(_training(config, kind, data, out))
    drafter = DrafterConfig(kind=kind, model=None if kind == "mtp" else str(out))
    return _measured(config, str(out) if kind == "mtp" else config.model, drafter, asked)


def _measured(config: StudyConfig, model: str, drafter: DrafterConfig, asked: list[str]) -> dict[str, Any]:
    drafting = drafter.model_copy(update={"draft_tokens": config.initialisation.draft_tokens})
    sampling = {"max_tokens": config.lengths.response_tokens, "ignore_eos": True}
    with engine(config, model, drafting, config.lengths.streams) as llm:
        generate(llm, asked[: config.lengths.streams], max_tokens=8)
        return measured(*generate(llm, asked, **sampling))
