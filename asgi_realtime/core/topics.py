"""The index behind every topic: which runs changed, in the order of their last change.

One entry per run: position, run id, version. A change moves the run to the end, at a new position, so a slow reader
gets each changed run once, in its newest version. The only gap is at the front, where old runs are dropped. The index
never copies the state of a run. Its epoch is random, so a cursor of an earlier index with the same name is recognized.
"""

from __future__ import annotations

from itertools import takewhile
from typing import NamedTuple


class Cursor(NamedTuple):
    """A position in a topic. As text, in an SSE id: `<epoch>.<position>`."""

    epoch: str
    position: int

    def __str__(self) -> str:
        return f"{self.epoch}.{self.position}"

    @classmethod
    def parse(cls, text: str) -> Cursor | None:
        """Parse a cursor. Returns None if the text is not one."""
        epoch, dot, position = text.rpartition(".")
        if not dot or not epoch or not (position.isascii() and position.isdigit()) or len(position) > 18:
            return None
        return cls(epoch, int(position))


class Change(NamedTuple):
    """A run's newest entry in a topic."""

    position: int
    run_id: str
    version: int


class Changes(NamedTuple):
    """What changed after a reader's cursor, oldest first, and the cursor to continue from.

    `snapshot`: these are all runs of the topic, because the reader had no cursor, or its cursor has another epoch or
    lies in the dropped part.
    """

    cursor: Cursor
    items: list[Change]
    snapshot: bool


class TopicIndex:
    """The newest `max_runs` runs of one topic."""

    __slots__ = ("_entries", "epoch", "floor", "max_runs", "position")

    def __init__(self, epoch: str, *, max_runs: int) -> None:
        self.epoch = epoch
        self.position = 0
        self.floor = 0  # the position of the last entry that max_runs has dropped
        self.max_runs = max_runs
        self._entries: dict[str, Change] = {}  # in the order of position

    def __len__(self) -> int:
        return len(self._entries)

    def update(self, run_id: str, version: int) -> bool:
        """Record a version of a run. Returns whether it is newer than the recorded one; otherwise nothing changes."""
        known = self._entries.get(run_id)
        if known is not None and known.version >= version:
            return False
        self.put(Change(self.position + 1, run_id, version))
        return True

    def put(self, change: Change) -> None:
        """Record a change that has its position already, after all others."""
        self._entries.pop(change.run_id, None)
        self._entries[change.run_id] = change
        self.position = change.position
        while len(self._entries) > self.max_runs:
            self.floor = self._entries.pop(next(iter(self._entries))).position

    def forget(self, run_id: str) -> None:
        """Remove an expired run. No change announces this."""
        self._entries.pop(run_id, None)

    def after(self, cursor: Cursor | None, *, limit: int) -> Changes:
        """The oldest `limit` changes after the cursor, so that a reader can continue from the last one.

        Without a usable cursor, a snapshot: the newest `limit` runs.
        """
        usable = cursor is not None and cursor.epoch == self.epoch and self.floor <= cursor.position <= self.position
        if cursor is None or not usable:
            items = list(self._entries.values())[-limit:]
            return Changes(Cursor(self.epoch, self.position), items, True)
        newest_first = takewhile(lambda change: change.position > cursor.position, reversed(self._entries.values()))
        items = list(newest_first)[::-1]
        if len(items) > limit:
            items = items[:limit]
            return Changes(Cursor(self.epoch, items[-1].position), items, False)
        return Changes(Cursor(self.epoch, self.position), items, False)
