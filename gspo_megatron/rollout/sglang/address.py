"""Where a server is, and what it fails with."""

from __future__ import annotations

from dataclasses import dataclass, field

from gspo_megatron.errors import CauseError


@dataclass(frozen=True)
class ServerAddress:
    """One SGLang server."""

    url: str  # "http://host:port", without a slash at the end
    api_key: str | None = field(default=None, repr=False)  # sent as a bearer token


class ServerError(CauseError):
    """A server did not do what it was asked."""

    def __init__(self, address: ServerAddress, call: str, reason: str) -> None:
        super().__init__(f"SGLang server {address.url}: {call} failed: {reason}")
        self.address, self.call, self.reason = address, call, reason


class ServerUnavailable(ServerError):
    """No answer, a broken connection, a timeout or a 5xx: another server may do it."""


class ServerRefused(ServerError):
    """A 4xx or an answer that says no: asking again would not help."""
