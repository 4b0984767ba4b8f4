"""Work in blocks, shared between threads: the reading, decoding and comparing libraries let the GIL go."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Work = TypeVar("Work")
Result = TypeVar("Result")
AHEAD = 3  # blocks that wait for each thread


class _Buffers(threading.local):
    """Each thread's own buffers, by name: memory that is used again is memory that need not be cleared."""

    def __init__(self) -> None:
        self._buffers: dict[str, bytearray] = {}

    def get(self, name: str, size: int) -> memoryview:
        """`size` bytes; what they hold is what was last put there, at first zeros."""
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < size:
            buffer = self._buffers[name] = bytearray(size)
        return memoryview(buffer)[:size]


BUFFERS = _Buffers()


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(
    function: Callable[[Work], Result], works: Iterable[Work], threads: int
) -> Generator[tuple[Work, Result], None, None]:
    """Each piece of work with its result, in order, some pieces ahead of who asks.

    An exception ends it where it belongs in the order; when the iterator is closed, running pieces come to
    their end first and none is begun.
    """
    if threads < 2:
        for work in works:
            yield work, function(work)
        return
    waiting: deque[tuple[Work, Future[Result]]] = deque()
    with ThreadPoolExecutor(threads, "imgloop-work") as pool:
        try:
            for work in works:
                waiting.append((work, pool.submit(function, work)))
                if len(waiting) > AHEAD * threads:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(cancel_futures=True)
