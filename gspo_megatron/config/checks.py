"""What several sections check alike."""

from __future__ import annotations

from typing import Any

from gspo_megatron.errors import UserError


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def require_positive(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{section}.{name}={value} must be positive")
