"""A cache bounded by bytes."""

from __future__ import annotations

from threading import Lock
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Cache(Generic[K, V]):
    """Values by key, `limit` bytes of them; the oldest leave first.

    `get` is a plain dictionary look-up, so that a hit costs next to nothing; it does not make a value younger.
    A value larger than the whole cache is not kept.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._values: dict[K, V] = {}
        self._sizes: dict[K, int] = {}
        self._lock = Lock()
        self.get = self._values.get

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._values.clear()
            self._sizes.clear()
            self.used = 0

    def put(self, key: K, value: V, size: int) -> None:
        """Keep `value`, which takes `size` bytes."""
        with self._lock:
            if size > self.limit or key in self._values:
                return
            while self.used + size > self.limit:
                oldest = next(iter(self._values))
                del self._values[oldest]
                self.used -= self._sizes.pop(oldest)
            self._values[key] = value
            self._sizes[key] = size
            self.used += size
