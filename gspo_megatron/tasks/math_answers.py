"""Rewards of `jsonl` rows: mathematical answers by math-verify, other answers by equality.

Imports nothing of torch: it runs in reward workers. math-verify's own timeouts are switched off: they
need the main thread and turn a hang into "wrong". The worker is killed instead, and the response is
counted as timed out.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

import math_verify

Scoring = Literal["math", "exact"]

_DELIMITED = re.compile(r"\\boxed\s*\{|\$.+\$|\\\(.+\\\)|\\\[.+\\\]", re.DOTALL)
_COMMAND = re.compile(r"\\[A-Za-z]+")
_DATE_TIME_OR_FLOAT = re.compile(r"\d\s*:\s*\d|\d+-\d+-\d+|\d+/\d+/\d+|\d[eE][+-]?\d")
_WORD = re.compile(r"[^\W\d_]{2,}")
_FUNCTIONS = frozenset(
    {"sqrt", "sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "pi", "abs", "max", "min"}
)
_MATHEMATICAL = re.compile(r"[\d+\-*/^=]")


def is_mathematical(text: str) -> bool:
    """Whether a whole text is a mathematical expression, by its form alone.

    Yes for anything between mathematical delimiters or with a LaTeX command, and for numbers, operators
    and single letters. No for words, a lone letter, dates, times and numbers such as 1e-5.
    """
    stripped = text.strip()
    if _DELIMITED.fullmatch(stripped) or stripped.startswith("\\boxed"):
        return True
    if "\n" in stripped or _DATE_TIME_OR_FLOAT.search(stripped):
        return False
    if any(word not in _FUNCTIONS for word in _WORD.findall(_COMMAND.sub(" ", _without_text(stripped)))):
        return False
    return bool(_COMMAND.search(stripped) or (_MATHEMATICAL.search(stripped) and re.search(r"\w", stripped)))


def row_scoring(answer: str) -> Scoring:
    """How a row with this answer is scored: a pure function of the answer."""
    return "math" if is_mathematical(answer) else "exact"


def score_row(response_text: str, reference: Mapping[str, Any]) -> float:
    """1 for a right response, else 0.

    "exact": the response equals the answer, both stripped. "math": that, or math-verify finds the
    response's final answer (a boxed one first, else its last expression) equal to the answer.
    A response that math-verify cannot read is wrong.
    """
    answer = str(reference["answer"])
    if response_text.strip() == answer.strip():
        return 1.0
    if reference["scoring"] == "exact":
        return 0.0
    gold = _parse_gold(answer)
    return float(bool(gold) and math_verify.verify(gold, _parse(response_text), timeout_seconds=None))


def _without_text(latex: str) -> str:
    return re.sub(r"\\(?:text|mathrm|textbf|mbox|operatorname)\s*\{[^{}]*\}", r"\\text", latex)


@lru_cache(maxsize=1)
def _quieten_math_verify() -> None:
    """It warns that its timeouts are off; here they are off on purpose."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)


def _parse(text: str) -> list[Any]:
    _quieten_math_verify()
    stripped = text.strip()
    bare = is_mathematical(stripped) and not _DELIMITED.search(stripped)
    # Without delimiters math-verify would read only a number out of an expression such as 2*x+3.
    return math_verify.parse(f"${stripped}$" if bare else text, parsing_timeout=None)


@lru_cache(maxsize=4096)
def _parse_gold(answer: str) -> list[Any]:
    return _parse(answer)
