"""The one exception type that means: the input is wrong, not the program."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user gave is wrong. The message holds the value and the remedy.

    The command line prints the message without a traceback and ends with exit code 2.
    """


def nearest(word: str, candidates: Iterable[str]) -> str:
    """' Did you mean "x"?' for the closest candidate, or '' if none is close."""
    matches = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.5)
    return f' Did you mean "{matches[0]}"?' if matches else ""
