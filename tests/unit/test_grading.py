"""Grading: right answers in the forms that policies write, and right answers that a grader cannot read."""

import pytest

from rl_loop.tasks.grading import check_answer, grade, grader_of


@pytest.mark.parametrize(
    ("answer", "grader"),
    [
        ("B", "choice"),
        ("(B)", "choice"),
        ("B.", "choice"),
        ("\\text{(C)}", "choice"),
        ("Paris", "text"),
        ("yes", "text"),
        ("No", "text"),
        ("New York", "text"),
        ("\\text{Paris}", "text"),
        ("4 July 1776", "text"),
        ("x-ray", "text"),
        ("C++", "text"),
        ("東京", "text"),
        ("72", "math"),
        ("-1,200.50", "math"),
        ("$72", "math"),
        ("72%", "math"),
        ("1/2", "math"),
        ("12 km", "math"),
        ("12 apples", "math"),
        ("12\\text{ cm}", "math"),
        ("x", "math"),
        ("x+1", "math"),
        ("xy+1", "math"),
        ("sin(x)", "math"),
        ("pi", "math"),
        ("x**2", "math"),
        ("(1,2)", "math"),
        ("[1, 2)", "math"),
        ("{1, 2, 3}", "math"),
        ("1, 2 and 3", "math"),
        ("\\frac{1}{2}", "math"),
        ("$\\sqrt{2}$", "math"),
        ("\\boxed{7}", "math"),
        ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "math"),
    ],
)
def test_auto_distinguishes_choices_text_and_mathematics(answer, grader):
    assert grader_of(answer) == grader
    check_answer(grader, answer)
    assert grade("auto", answer, answer) == 1.0, "an answer is right if it is given as it stands in the file"


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        ("Paris", ["paris", "Paris.", " **Paris** ", "$\\text{Paris}$", '"Paris"'], ["", "London", "Par is"]),
        ("the Eiffel Tower", ["Eiffel tower", "The  Eiffel\tTower."], ["Tower", "Eiffel"]),
        ("yes", ["Yes", "yes."], ["no", "y"]),
        ("ﬁve", ["five", "FIVE"], ["5"]),
        ("B", ["B", "b", "(B)", "B.", "B) Paris", "**B**", "$\\boxed{B}$", "the answer is B."], ["", "C", "Bern", "A"]),
        ("(B)", ["B", "(b)"], ["(C)", "I do not know"]),
        ("x+1", ["x + 1", "1+x", "$x+1$", "\\(1 + x\\)"], ["", "x", "1", "x-1"]),
        ("2x+1", ["1+2x", "2*x+1"], ["2", "1", "x+1"]),
        ("(1,2)", ["(1, 2)", "$(1,2)$", "\\left(1, 2\\right)"], ["", "2", "(2,1)", "[1,2]"]),
        ("(3, 1)", ["(3,1)"], ["1", "(5,2)", "(3,2)"]),
        ("1e-3", ["0.001", "10^{-3}"], ["1", "3"]),
        ("x**2", ["x^2", "x*x"], ["x", "2x"]),
        ("sin(x)", ["\\sin x", "\\sin(x)"], ["cos(x)", "x"]),
        ("2pi", ["2\\pi", "2*pi"], ["2", "pi"]),
        ("1/2", ["0.5", "\\frac{1}{2}", "2/4", "50%", "it is 1/2"], ["1", "2", "0.4"]),
        ("3 1/2", ["3.5", "7/2", "3 1/2"], ["3/2", "3", "1/2"]),
        ("-1 1/4", ["-1.25"], ["1.25", "-0.75"]),
        ("\\$18.90", ["18.9", "$18.90", "18.90 dollars"], ["18", "90"]),
        ("1,200", ["1200", "$1,200", "1200.0"], ["1", "200"]),
        ("12 km", ["12", "12 km", "12\\text{ km}"], ["13 km", "km"]),
        ("-5", ["−5", "x = -5"], ["5"]),
        ("7", ["6+1=7", "it is 7", "7.", "x=7", "7 apples"], ["8", "seventy"]),
    ],
)
def test_auto_grades_answers_as_policies_write_them(answer, right, wrong):
    assert {given: grade("auto", answer, given) for given in right} == dict.fromkeys(right, 1.0)
    assert {given: grade("auto", answer, given) for given in wrong} == dict.fromkeys(wrong, 0.0)


def test_the_configured_grader_grades():
    assert (grade("text", "1/2", "0.5"), grade("math", "1/2", "0.5")) == (0.0, 1.0)
    assert (grade("text", "b", "(B)"), grade("choice", "b", "B) Paris")) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("grader", "answer", "message"),
    [
        ("math", "C++", "`answer` 'C\\+\\+' is not a number or a formula"),
        ("math", "東京", "is not a number or a formula"),
        ("math", "Paris", "is not a number or a formula"),
        ("math", "New York", "is not a number or a formula"),
        ("choice", "Paris", "`answer` 'Paris' is not the letter of a choice"),
        ("choice", "1", "is not the letter of a choice"),
        ("text", " ", "`answer` is empty"),
        ("auto", "", "`answer` is empty"),
        ("auto", None, "`answer` is None, neither text nor a number"),
        ("auto", True, "`answer` is True, neither text nor a number"),
        ("auto", ["4"], "neither text nor a number"),
    ],
)
def test_an_answer_that_its_grader_cannot_read_is_refused(grader, answer, message):
    with pytest.raises(ValueError, match=message):
        check_answer(grader, answer)
