"""The key that servers ask for: where it comes from, and what it may look like."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

from gspo_megatron.config import SGLangConfig
from gspo_megatron.errors import UserError

ENVIRONMENT_VARIABLE = "GSPO_SGLANG_API_KEY"
_LOOPBACK = re.compile(r"localhost|127(\.\d+){3}|::1")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    return _LOOPBACK.fullmatch(host) is not None


def find_api_key(config: SGLangConfig) -> str | None:
    """The servers' key: the first line of api_key_file, else the environment variable GSPO_SGLANG_API_KEY, else a new
    random one for servers that are started here on an address that other machines can reach, else None.

    A random key is another one at every call: whoever starts the servers asks once and passes it on.

    Raises:
        UserError: the file can't be read, or the key is none that can be sent.
    """
    if config.api_key_file:
        return _checked(_first_line(Path(config.api_key_file)), f"the first line of {_file(config)}")
    if ENVIRONMENT_VARIABLE in os.environ:
        return _checked(os.environ[ENVIRONMENT_VARIABLE], f"the environment variable {ENVIRONMENT_VARIABLE}")
    if is_random(config):
        return secrets.token_hex(32)
    return None


def is_random(config: SGLangConfig) -> bool:
    """Whether `find_api_key` makes a new key, which nobody else can know."""
    given = config.api_key_file or ENVIRONMENT_VARIABLE in os.environ
    return not given and not config.server_addresses and not is_loopback(config.host)


def describe_api_key(config: SGLangConfig) -> str:
    """Where the key comes from, never the key."""
    if config.api_key_file:
        return f"key from {_file(config)}"
    if ENVIRONMENT_VARIABLE in os.environ:
        return f"key from the environment variable {ENVIRONMENT_VARIABLE}"
    return "a random key, made for this run" if is_random(config) else "no key"


def _file(config: SGLangConfig) -> str:
    return f"sglang.api_key_file={config.api_key_file}"


def _first_line(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a text file"
        raise UserError(
            f"sglang.api_key_file={path} cannot be read: {reason}; give a file with the key in its first line, "
            "made e.g. with: (umask 077; openssl rand -hex 32 > FILE)"
        ) from None
    return lines[0].strip() if lines else ""


def _checked(key: str, source: str) -> str:
    # A bearer token without spaces, and nothing that SGLang would take for an option. The message must not show it.
    if not re.fullmatch(r"[!-,./-~][!-~]*", key):
        what = "is empty" if not key else "is no key"
        raise UserError(
            f"{source} {what}: letters, digits and punctuation without spaces are needed, and no - at the start; "
            "openssl rand -hex 32 makes one"
        )
    return key
