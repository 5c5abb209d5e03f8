"""A taskset of verifiers: two sums, with a reward for a response that has a digit. vf-eval loads it by its name."""

import verifiers.v1 as vf


class SumTask(vf.Task[vf.TaskData]):
    @vf.reward(weight=1.0)
    async def has_a_digit(self, trace: vf.Trace) -> float:
        replies = [node.message.content or "" for node in trace.nodes if node.sampled]
        return float(any(character.isdigit() for reply in replies for character in reply))


class SumsTaskset(vf.Taskset[SumTask, vf.TasksetConfig]):
    def load(self) -> list[SumTask]:
        text = "State the final answer to the following arithmetic problem: {} ="
        problems = "12 + 34", "71 - 26"
        return [SumTask(vf.TaskData(prompt=text.format(problem)), self.config.task) for problem in problems]


__all__ = ["SumsTaskset"]
