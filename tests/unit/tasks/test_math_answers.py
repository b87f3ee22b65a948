"""Which answers count as mathematical, and what math-verify makes of responses to them."""

from __future__ import annotations

import threading

import pytest

from gspo_megatron.tasks.math_answers import is_mathematical, row_scoring, score_row

# fmt: off
MATHEMATICAL = [
    "42", "-3", "0.5", "1,234", "50%", "1/2", "$\\frac{1}{2}$", "\\frac{1}{2}",
    "\\boxed{3}", "\\boxed{\\text{red}}", "2\\sqrt{3}", "(1,2)", "[2,5)", "\\{1,2\\}", "x^2+1", "p - q",
    "x=5", "sqrt(2)", "\\pi", "\\text{Evelyn}", "10^10", "$18", "$5$ and $6$", "\\(x\\)",
]
NOT_MATHEMATICAL = [
    "", "A", "x", "Paris", "3 apples", "12:30", "2020-01-02", "1/2/2020",
    "1e-5", "True", "yes/no", "-", "+", "one\n2",
]
# fmt: on


@pytest.mark.parametrize("answer", MATHEMATICAL)
def test_mathematical(answer: str) -> None:
    assert is_mathematical(answer) and is_mathematical(f"  {answer}\n") and row_scoring(answer) == "math"
    assert score_row(answer, {"answer": answer, "scoring": "math"}) == 1.0
    assert score_row("completely wrong", {"answer": answer, "scoring": "math"}) == 0.0


@pytest.mark.parametrize("answer", NOT_MATHEMATICAL)
def test_not_mathematical(answer: str) -> None:
    assert not is_mathematical(answer) and row_scoring(answer) == "exact"


@pytest.mark.parametrize(
    ("answer", "response", "score"),
    [
        ("1/2", "0.5", 1.0),
        ("1/2", "\\frac{2}{4}", 1.0),
        ("1/2", "So the answer is 1/2.", 1.0),
        ("1/2", "First 3, then 4.\nSo \\boxed{0.5}. Check: 7", 1.0),
        ("1/2", "1/3", 0.0),
        ("x^2+1", "1+x^2", 1.0),
        ("2*x+3", "3+2x", 1.0),
        ("2*x+3", "2", 0.0),
        ("\\sqrt{8}", "2\\sqrt{2}", 1.0),
        ("\\text{Evelyn}", "it is \\boxed{\\text{Evelyn}}", 1.0),
        ("\\text{Evelyn}", "it is \\boxed{\\text{Robert}}", 0.0),
        ("1,234", "1234", 1.0),
        ("50%", "0.5", 1.0),
        ("(1,2)", "\\boxed{(1, 2)}", 1.0),
        ("12", "the first is 12 and the last is 13", 0.0),
        ("3", "", 0.0),
        ("3", "\\boxed{", 0.0),
        ("3", "$$$}{\\frac{", 0.0),
    ],
)
def test_math_scores(answer: str, response: str, score: float) -> None:
    assert score_row(response, {"answer": answer, "scoring": "math"}) == score


def test_works_outside_the_main_thread() -> None:
    """math-verify's own timeouts use signals, which would raise here."""
    scores: list[float] = []
    thread = threading.Thread(target=lambda: scores.append(score_row("0.25", {"answer": "1/4", "scoring": "math"})))
    thread.start()
    thread.join()
    assert scores == [1.0]
