"""What a check comes to: a plan that passed, or everything that is wrong with it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from gspo_megatron.errors import UserError


@dataclass(frozen=True)
class Preflight:
    """A plan that passed: what it will do, and what is doubtful about it."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """Printed once by every run."""
        lines = [f"{name:<10} {text}" for name, text in self.rows]
        return "\n".join(lines + [f"warning: {text}" for text in self.warnings])


@dataclass
class Problems:
    """Collects what is wrong, so that one message holds all of it."""

    messages: list[str] = field(default_factory=list)

    def require(self, condition: bool, message: str) -> None:
        if not condition:
            self.messages.append(message)

    @contextlib.contextmanager
    def collect(self) -> Iterator[None]:
        """Take a UserError of the block as one problem."""
        try:
            yield
        except UserError as error:
            self.messages.append(str(error))

    def raise_if_any(self) -> None:
        if len(self.messages) == 1:
            raise UserError(self.messages[0])
        if self.messages:
            raise UserError(f"{len(self.messages)} things are wrong:\n" + "\n".join(f"- {m}" for m in self.messages))


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def one_of(values: Sequence[int], most: int = 10) -> str:
    """'1', '1 or 2', '1, 2, 3 …'."""
    shown = [str(v) for v in values[:most]]
    if len(values) > most:
        return ", ".join(shown) + " …"
    return " or ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))
