"""Keys by the time at which they are due, in memory."""

from __future__ import annotations

import heapq
import itertools


class DueTimes:
    """A heap. Entries that were superseded stay in it until they come up, or until they outnumber the current ones."""

    __slots__ = ("_current", "_heap", "_numbers")

    def __init__(self) -> None:
        self._current: dict[str, tuple[int, int, str]] = {}
        self._heap: list[tuple[int, int, str]] = []
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._current)

    def __contains__(self, key: str) -> bool:
        return key in self._current

    def set(self, key: str, at_ms: int | None) -> None:
        """Set when a key is due; None: never."""
        if at_ms is None:
            self._current.pop(key, None)
        elif key not in self._current or self._current[key][0] != at_ms:
            self._current[key] = entry = (at_ms, next(self._numbers), key)
            heapq.heappush(self._heap, entry)
        if len(self._heap) > 64 + 2 * len(self._current):
            self._heap = list(self._current.values())
            heapq.heapify(self._heap)

    def is_due(self, key: str, now_ms: float) -> bool:
        """Whether the key is due."""
        return key in self._current and self._current[key][0] <= now_ms

    def due(self, now_ms: float, limit: int) -> list[str]:
        """The keys that are due, oldest first, and in the order they were set if equal. They stay due."""
        found: list[tuple[int, int, str]] = []
        while self._heap and self._heap[0][0] <= now_ms and len(found) < limit:
            entry = heapq.heappop(self._heap)
            if self._current.get(entry[2]) is entry:
                found.append(entry)
        for entry in found:
            heapq.heappush(self._heap, entry)
        return [key for _, _, key in found]
