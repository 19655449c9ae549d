"""Keys by the time at which they are due, in memory."""

from __future__ import annotations

import heapq


class DueTimes:
    """A heap. Entries that were superseded stay in it until they come up, or until they outnumber the current ones."""

    __slots__ = ("_at", "_heap")

    def __init__(self) -> None:
        self._at: dict[str, int] = {}
        self._heap: list[tuple[int, str]] = []

    def __contains__(self, key: str) -> bool:
        return key in self._at

    def set(self, key: str, at_ms: int | None) -> None:
        """Set when a key is due; None: never."""
        if at_ms is None:
            self._at.pop(key, None)
        elif self._at.get(key) != at_ms:
            self._at[key] = at_ms
            heapq.heappush(self._heap, (at_ms, key))
        if len(self._heap) > 64 + 2 * len(self._at):
            self._heap = [(at, key) for key, at in self._at.items()]
            heapq.heapify(self._heap)

    def due(self, now_ms: float, limit: int) -> list[str]:
        """The keys that are due, oldest first. They stay due."""
        found: dict[str, int] = {}
        while self._heap and self._heap[0][0] <= now_ms and len(found) < limit:
            at_ms, key = heapq.heappop(self._heap)
            if self._at.get(key) == at_ms:
                found[key] = at_ms
        for key, at_ms in found.items():
            heapq.heappush(self._heap, (at_ms, key))
        return list(found)
