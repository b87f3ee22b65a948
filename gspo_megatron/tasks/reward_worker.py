"""The program of a reward worker: loads one function and calls it for each response it is sent.

Started by worker_pool as a plain script, in a process of its own that shares nothing with the trainer:
neither its __main__ module, nor torch, nor its process groups. It imports the standard library and
what the function's module imports.

Messages in: first a Setup as a dict, then (response_text, reference). Messages out: ("ready", None) or
("invalid", reason) once; then ("value", float) or ("failed", reason) per response. It ends when the
pipe closes.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import pickle
import signal
import sys
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

MAX_REASON_CHARACTERS = 500
ORPHAN_GRACE_S = 5.0  # a worker that hangs and whose trainer is gone ends itself this long after the timeout


class InvalidFunctionError(Exception):
    """The function cannot be loaded."""


def load_function(target: str, arguments: Mapping[str, Any]) -> Callable[[str, Any], Any]:
    """The function named "module:function", with keyword arguments bound.

    Raises:
        InvalidFunctionError: no such module or function, an import that fails, or a function that cannot be
            called as function(response_text, reference).
    """
    module_name, _, name = target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise InvalidFunctionError(f'cannot import module "{module_name}": {_describe(error)}') from error
    function = getattr(module, name, None)
    if function is None:
        close = difflib.get_close_matches(name, [n for n in vars(module) if callable(getattr(module, n))], n=1)
        hint = f' Did you mean "{close[0]}"?' if close else ""
        raise InvalidFunctionError(f'module "{module_name}" ({module.__file__}) has no "{name}".{hint}')
    if not callable(function):
        raise InvalidFunctionError(f'"{name}" is no function, it is of type {type(function).__name__}')
    if inspect.iscoroutinefunction(function):
        raise InvalidFunctionError(f'"{name}" is async; give a plain function')
    try:
        inspect.signature(function).bind("", None, **arguments)
    except TypeError as error:
        raise InvalidFunctionError(f'"{name}" cannot be called as {name}(response_text, reference): {error}') from error
    except ValueError:
        pass  # a builtin without a signature; the first call shows
    return partial(function, **arguments)


def call(function: Callable[[str, Any], Any], message: bytes) -> tuple[str, Any]:
    """("value", score), or ("failed", reason) if the function raises or returns no finite number."""
    try:
        response_text, reference = pickle.loads(message)
        result = function(response_text, reference)
        # float("0.5") works, but text is a sign of a mistake.
        number = not isinstance(result, (str, bytes)) and hasattr(result, "__float__")
        value = float(result) if number else math.nan
        shown = "" if math.isfinite(value) else f"the reward is {result!r}, which is no finite number"
    except (Exception, SystemExit) as error:
        return "failed", _describe(error)
    return ("failed", shown[:MAX_REASON_CHARACTERS]) if shown else ("value", value)


def main(file_descriptor: int) -> None:
    """Serve one pipe until it closes."""
    _outlive_stop_signals()
    connection = Connection(file_descriptor)
    setup = connection.recv()
    sys.path[:] = setup["sys_path"]
    try:
        function = load_function(setup["target"], setup["arguments"])
    except InvalidFunctionError as error:
        connection.send(("invalid", str(error)))
        return
    connection.send(("ready", None))
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, setup["timeout_s"] + ORPHAN_GRACE_S)
        answer = call(function, message)
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            connection.send(answer)
        except BrokenPipeError:
            return


def _outlive_stop_signals() -> None:
    """A scheduler sends them to every process; this one ends with its trainer, which still has a batch to score."""
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    for number in numbers:
        signal.signal(number, lambda *_: None)  # not ignored: what the function starts would inherit that
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:MAX_REASON_CHARACTERS]


if __name__ == "__main__":
    main(int(sys.argv[1]))
