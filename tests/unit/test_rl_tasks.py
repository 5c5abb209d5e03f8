"""Tasks: prompts of two splits, answers found in responses, grading, and custom rewards."""

import json

import pytest

from rl_loop.task_config import TaskConfig
from rl_loop.tasks import TaskError, make_task
from rl_loop.tasks.task import extract_answer

CHAIN_SUM = {
    "name": "chain_sum",
    "params": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
}


def jsonl(tmp_path, entries, **changes) -> TaskConfig:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return TaskConfig(kind="jsonl", path=path, **changes)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("6+1=7;Answer: 7", "7"),
        ("Answer: 1\nno: Answer:  -56 \n", "-56"),
        ("just 42 ", "just 42"),
        ("Answer:", ""),
    ],
)
def test_the_answer_is_the_last_match_or_else_everything(response, answer):
    assert extract_answer(r"Answer:\s*(.*)", response) == answer


def test_reasoning_gym_prompts_are_repeatable_and_graded_by_the_dataset():
    task = make_task(TaskConfig(**CHAIN_SUM))
    problem = task.prompt("train", 5)
    assert problem == task.prompt("train", 5)
    assert problem.prompt == problem.entry["question"] + "\n"
    assert task.reward(problem, f"working;Answer: {problem.entry['answer']}") == 1.0
    assert task.reward(problem, "Answer: 12345") < 1.0


def test_reasoning_gym_splits_are_disjoint_ranges_of_seeds():
    task = make_task(TaskConfig(size=4, seed=100, **CHAIN_SUM))
    shifted = make_task(TaskConfig(size=4, seed=104, **CHAIN_SUM))
    held_out = [task.prompt("held_out", i).prompt for i in range(4)]
    assert held_out == [shifted.prompt("train", i).prompt for i in range(4)]
    assert task.prompt("train", 4) == task.prompt("train", 0), "training repeats after `size` problems"


def test_a_chat_task_sends_messages():
    problem = make_task(TaskConfig(chat=True, system_prompt="Be brief.", **CHAIN_SUM)).prompt("train", 0)
    assert problem.prompt is None
    assert [m.role for m in problem.messages] == ["system", "user"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"name": "chain_summ"}, "task.name"), ({"params": {"terms": 3}}, "task.params")],
)
def test_an_unknown_dataset_or_parameter_is_named(changes, field):
    with pytest.raises(TaskError, match=field):
        make_task(TaskConfig(**(CHAIN_SUM | changes)))


def test_jsonl_answers_are_graded_by_value(tmp_path):
    entries = [{"prompt": f"What is {i} / 2?", "answer": f"{i}/2"} for i in range(20)]
    task = make_task(jsonl(tmp_path, entries, prompt_suffix=""))
    problem = task.prompt("train", 0)
    numerator = int(problem.entry["answer"].split("/")[0])
    assert task.reward(problem, f"so it is\nAnswer: {numerator / 2}") == 1.0
    assert task.reward(problem, f"Answer: {numerator / 2 + 1}") == 0.0
    train = [task.prompt("train", i).prompt for i in range(18)]
    assert len(set(train)) == 18
    assert [task.prompt("train", 18 + i).prompt for i in range(18)] != train, "each epoch has its own order"
    assert {task.prompt("held_out", i).prompt for i in range(2)}.isdisjoint(train)


def test_jsonl_prompts_may_be_messages(tmp_path):
    entries = [{"messages": [{"role": "user", "content": f"{i}?"}], "answer": str(i)} for i in range(2)]
    assert make_task(jsonl(tmp_path, entries)).prompt("train", 0).messages[0].content == "0?"


def test_messages_under_the_key_prompt_are_messages(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1?"}]
    problem = make_task(jsonl(tmp_path, [{"prompt": chat, "answer": "1"}] * 2)).prompt("train", 0)
    assert problem.prompt is None
    assert [message.model_dump() for message in problem.messages] == chat


def test_a_problem_names_its_origin(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('\n{"prompt": "0?", "answer": "0"}\n\n{"prompt": "1?", "answer": "1"}\n')
    task = make_task(TaskConfig(kind="jsonl", path=path))
    assert (task.prompt("train", 0).origin, task.prompt("held_out", 0).origin) == (f"{path}, line 2", f"{path}, line 4")
    assert make_task(TaskConfig(**CHAIN_SUM)).prompt("train", 7).origin == "chain_sum, problem 7 (train)"


@pytest.mark.parametrize("entry", [{"prompt": "?"}, {"answer": "4"}, {"prompt": 3, "answer": "4"}, ["prompt"]])
def test_a_bad_line_is_named(entry, tmp_path):
    with pytest.raises(TaskError, match="line 2"):
        make_task(jsonl(tmp_path, [{"prompt": "?", "answer": "4"}, entry]))


@pytest.mark.parametrize("held_out", [False, True])
def test_an_answer_that_its_grader_cannot_read_is_refused_with_its_line(held_out, tmp_path):
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text('{"prompt": "2 / 4?", "answer": "1/2"}\n' * 2)
    bad.write_text('{"prompt": "1?", "answer": 1}\n{"prompt": "What is the capital?", "answer": "Paris"}\n')
    paths = {"path": good, "held_out_path": bad} if held_out else {"path": bad}
    with pytest.raises(TaskError, match=r"bad\.jsonl, line 2: `answer` 'Paris' is not a number or a formula; task\."):
        make_task(TaskConfig(kind="jsonl", grader="math", **paths))


def test_answers_of_every_kind_are_graded_in_one_file(tmp_path):
    answers = ["Paris", "B", "yes", "x+1", "(1,2)", 72]
    entries = [{"prompt": f"{number}?", "answer": answer} for number, answer in enumerate(answers)]
    config = jsonl(tmp_path, entries).model_copy(update={"held_out_path": tmp_path / "prompts.jsonl"})
    task = make_task(config)
    problems = [task.prompt("held_out", index) for index in range(len(answers))]
    rewards = [[task.reward(problem, f"so\nAnswer: {answer}") for answer in answers] for problem in problems]
    assert rewards == [[float(row == column) for column in range(len(answers))] for row in range(len(answers))]


def test_a_file_for_a_custom_reward_needs_no_answer_that_can_be_read(tmp_path):
    entries = [{"prompt": "?", "answer": ["any", "of", "these"]}, {"prompt": "?"}]
    task = make_task(jsonl(tmp_path, entries, reward="operator:eq"))
    assert [task.prompt("train", index).prompt for index in range(2)] == ["?\n", "?\n"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"prompt": 3}, "line 1: `prompt`: Input should be a valid list; it must be text or messages"),
        ({"prompt": []}, "line 1: `prompt`: .* it must be text or messages"),
        ({"prompt": ["a", "b"]}, "line 1: `prompt.0`: "),
        ({"prompt": [{"role": "user"}]}, "line 1: `prompt.0.content`: Field required"),
        ({"messages": "?"}, "line 1: `messages`: .* it must be messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "line 1: `messages.0.content`: "),
    ],
)
def test_a_prompt_that_is_neither_text_nor_messages_is_named_in_one_line(entry, message, tmp_path):
    with pytest.raises(TaskError, match=message) as refused:
        make_task(jsonl(tmp_path, [entry | {"answer": "1"}]))
    assert "\n" not in str(refused.value)


def test_custom_reward_replaces_the_grading_of_any_task(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def short(response, entry):\n    return 1 / (1 + len(response)) if entry['question'] else 0\n"
    )
    monkeypatch.chdir(tmp_path)
    task = make_task(TaskConfig(reward="my_rewards:short", **CHAIN_SUM))
    assert task.reward(task.prompt("train", 0), "abc") == 0.25


@pytest.mark.parametrize("path", ["no_such_module:f", "json:no_such_function", "json:__doc__"])
def test_a_custom_reward_that_cannot_be_loaded_is_named(path):
    with pytest.raises(TaskError, match=r"task\.reward"):
        make_task(TaskConfig(reward=path, **CHAIN_SUM))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def reward(response, entry)\n    return 1.0\n", r"SyntaxError: expected ':' \({module}\.py, line 1\)"),
        ("x = 1\nx['a']\n", r"TypeError: .*not subscriptable \(.*{module}\.py, line 2\)"),
        ("import json\njson.loads('')\n", r"JSONDecodeError: .* \(.*, line \d+\)"),
        ("raise ValueError('two\\nlines')\n", r"ValueError: two lines \(.*{module}\.py, line 1\)"),
        ("import no_such_module\n", r"No module named 'no_such_module' \(.*{module}\.py, line 1\)"),
        ("import sys\n\nsys.exit('usage: ...')\n", r"SystemExit: usage: \.\.\. \(.*{module}\.py, line 3\)"),
        ("def other(): ...\n", "has no attribute 'reward'"),
        ("def reward(response): ...\n", "must take the response and the problem's entry: too many positional"),
    ],
)
def test_a_reward_module_that_fails_when_it_is_imported_is_named_in_one_line(code, message, tmp_path, monkeypatch):
    module = f"rewards_{abs(hash(code))}"
    (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        TaskError, match=rf"task\.reward: {module}:reward: .*" + message.replace("{module}", module)
    ) as e:
        make_task(TaskConfig(reward=f"{module}:reward", **CHAIN_SUM))
    assert "\n" not in str(e.value)
