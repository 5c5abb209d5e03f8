"""ReasoningGymTask: any dataset of reasoning-gym by name, graded by the dataset's own verifier."""

import warnings

from rl_loop.task_config import TaskConfig
from rl_loop.tasks.task import Split, TaskError, TaskProblem, extract_answer, problem_from_text

with warnings.catch_warnings():
    warnings.simplefilter("ignore", SyntaxWarning)  # its dependency cellpylib has invalid escapes
    import reasoning_gym
    from reasoning_gym.factory import DATASETS


class ReasoningGymTask:
    """Problem i of a dataset is made from the dataset's seed + i. The splits are disjoint ranges of seeds:

    training [seed, seed + size), held out [seed + size, seed + 2 size).
    """

    def __init__(self, config: TaskConfig):
        self.config = config
        if config.name not in DATASETS:
            raise TaskError(f"task.name: reasoning-gym has no dataset {config.name!r}; it has {', '.join(DATASETS)}")
        starts: dict[Split, int] = {"train": config.seed, "held_out": config.seed + config.size}
        try:
            self.datasets = {
                split: reasoning_gym.create_dataset(config.name, seed=seed, size=config.size, **config.params)
                for split, seed in starts.items()
            }
        except (TypeError, ValueError, AssertionError) as error:
            raise TaskError(f"task.params: {config.name}: {error}") from error

    def size(self, split: Split) -> int:
        return self.config.size

    def prompt(self, split: Split, index: int) -> TaskProblem:
        number = index % self.config.size
        entry = self.datasets[split][number]
        origin = f"{self.config.name}, problem {number} ({split})"
        return problem_from_text(self.config, entry["question"], entry, origin)

    def reward(self, problem: TaskProblem, response: str) -> float:
        answer = extract_answer(self.config.answer_pattern, response)
        return float(self.datasets["train"].score_answer(answer, problem.entry))
