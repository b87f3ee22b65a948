"""An asyncio loop in a thread of its own: the main thread blocks in collectives while requests go on."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """Runs coroutines for a thread that has no loop. It ends with the process, or by `close`."""

    def __init__(self, name: str = "sglang-requests") -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start a coroutine; cancelling the future cancels it."""
        if self._loop.is_closed():
            coroutine.close()
            raise RuntimeError("the loop is closed")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """Wait for a coroutine and return its result. What stops the wait, a timeout or ctrl-C, cancels it.

        Raises:
            TimeoutError: it took longer than `timeout_s`.
        """
        # Waiting for itself would never end.
        assert threading.current_thread() is not self._thread, "run called in the loop's own thread"
        future = self.submit(coroutine)
        try:
            return future.result(timeout_s)
        except BaseException:
            future.cancel()  # nothing happens if the coroutine itself has ended
            raise

    def close(self) -> None:
        """Cancel what still runs and end the thread. A second call does nothing."""
        if self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
