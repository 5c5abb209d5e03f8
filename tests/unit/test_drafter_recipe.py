"""The demo recipe's worked solutions, graded by the verifier that grades the policy."""

import sys
from pathlib import Path

import reasoning_gym

sys.path.append(str(Path(__file__).parents[2] / "deploy" / "demo" / "recipe"))

from working import solution


def test_worked_solutions_are_graded_right():
    dataset = reasoning_gym.create_dataset(
        "chain_sum", seed=7, size=2000, min_terms=3, max_terms=4, min_digits=2, max_digits=2
    )
    answers = [solution(problem["metadata"]["expression"]).rsplit("Answer: ", 1)[-1] for problem in dataset]
    assert sum(answer.startswith("-") for answer in answers) > 300
    wrong = [a for a, problem in zip(answers, dataset, strict=True) if dataset.score_answer(a, problem) != 1.0]
    assert wrong == []


def test_slips_are_as_frequent_as_configured_and_the_rest_of_the_solution_follows_from_them():
    dataset = reasoning_gym.create_dataset(
        "chain_sum", seed=7, size=1000, min_terms=3, max_terms=3, min_digits=2, max_digits=2
    )
    expressions = [problem["metadata"]["expression"] for problem in dataset]
    worked = [solution(expression, seed=i, slips=0.1) for i, expression in enumerate(expressions)]
    assert worked == [solution(expression, seed=i, slips=0.1) for i, expression in enumerate(expressions)]
    right = sum(w == solution(e) for w, e in zip(worked, expressions, strict=True)) / len(worked)
    assert 0.55 < right < 0.72  # four or five columns: 0.9^4 = 0.66, 0.9^5 = 0.59
    for w in worked:
        first, second, answer = w.split(";")
        assert second.startswith(first.rsplit("=", 1)[1])
        assert answer == f"Answer: {second.rsplit('=', 1)[1]}"


def test_columns_carry_borrow_and_swap():
    assert solution("42 + 81 - 156") == ("42+81:2+1=3,4+8=12=123;123-156=-(156-123):6-3=3,5-2=3,1-1=0=-33;Answer: -33")
    assert solution("38 - 19") == "38-19:18-9=9,3-1-1=1=19;Answer: 19"
