"""What weights are called at the servers: the run that sent them and their number."""

from __future__ import annotations

import re

NEVER_SET = "default"  # what a server calls the weights it was started with


class OtherRun(ValueError):
    """A server has the weights of another run."""


class VersionNames:
    """The names that one run gives its weights. Numbers alone are alike in all runs, and a server may serve several."""

    def __init__(self, run: str = "") -> None:
        """`run`: eight hexadecimal digits that no other run has; none: names are plain numbers."""
        self._prefix = f"{run}-" if run else ""

    def name(self, number: int) -> str:
        """Of weight version `number`."""
        return f"{self._prefix}{number}"

    def number(self, name: str) -> int:
        """The weight version of a name; -1 for weights that a server was started with.

        Raises:
            OtherRun: another run has named it.
            ValueError: it is not a name that this program gives.
        """
        if name == NEVER_SET:
            return -1
        number = name.removeprefix(self._prefix)
        if name.startswith(self._prefix) and number.isdecimal():
            return int(number)
        if re.fullmatch(r"[0-9a-f]{8}-\d+", name):
            raise OtherRun(
                f"its weights are {name!r}, which another run has sent: two runs use this server; give each its own"
            )
        raise ValueError(f"weight version {name!r} is not one that this program sets")
