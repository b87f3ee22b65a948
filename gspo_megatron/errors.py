"""Exception types that say who is to blame: the input, or the one who raises and not another rank."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user gave is wrong. The message holds the value and the remedy.

    The command line prints the message without a traceback and ends with exit code 2.
    """


class CauseError(RuntimeError):
    """A failure that its rank knows the reason of: never the effect of another rank's, whatever its message quotes."""


def nearest(word: str, candidates: Iterable[str]) -> str:
    """' Did you mean "x"?' for the closest candidate, or '' if none is close."""
    matches = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.5)
    return f' Did you mean "{matches[0]}"?' if matches else ""
