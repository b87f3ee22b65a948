"""Where a server is, and what it fails with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gspo_megatron.errors import CauseError, UserError


@dataclass(frozen=True)
class ServerAddress:
    """One SGLang server."""

    url: str  # "http://host:port", without a slash at the end
    api_key: str | None = field(default=None, repr=False)  # sent as a bearer token


class ServerError(CauseError):
    """A server did not do what it was asked."""

    def __init__(self, address: ServerAddress, call: str, reason: str, *, status: int | None = None) -> None:
        """`status` of the HTTP answer, where one came that told the failure."""
        super().__init__(f"SGLang server {address.url}: {call} failed: {reason}")
        self.address, self.call, self.reason, self.status = address, call, reason, status


class ServerUnavailable(ServerError):
    """No answer, a broken connection, a timeout or a 5xx: another server may do it."""


class ServerRefused(ServerError):
    """A 4xx or an answer that says no: asking again would not help."""


def not_reached(
    errors: Sequence[ServerError], *, remedy: str = "start it with `serve`, or correct sglang.addresses"
) -> UserError:
    """Failures of servers that were only asked what they are, as the user can mend them.

    `remedy` for those that did not fail for want of the key.
    """
    key = "give its key by sglang.api_key_file or the environment variable GSPO_SGLANG_API_KEY"
    remedies = dict.fromkeys(key if error.status == 401 else remedy for error in errors)
    return UserError(f"{'; '.join(map(str, errors))}; {', and '.join(remedies)}")
