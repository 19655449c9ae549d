"""The index behind every topic: which runs changed, in the order of their last change.

One entry per run: position, run id, version. A change moves the run to the end under a new position, so a reader who
is behind meets each changed run once, in its newest version; there are no gaps but the front that was dropped. The
state of a run is never copied here. The epoch is random and made with the index, so that a position cannot be taken
for one of another index of the same name.
"""

from __future__ import annotations

from itertools import takewhile
from typing import NamedTuple


class Cursor(NamedTuple):
    """A place in a topic. As text, in an SSE id: `<epoch>.<position>`."""

    epoch: str
    position: int

    def __str__(self) -> str:
        return f"{self.epoch}.{self.position}"

    @classmethod
    def parse(cls, text: str) -> Cursor | None:
        """Read a cursor back, or return None if the text is none."""
        epoch, dot, position = text.rpartition(".")
        if not dot or not epoch or not (position.isascii() and position.isdigit()) or len(position) > 18:
            return None
        return cls(epoch, int(position))


class Change(NamedTuple):
    """A run's newest place in a topic."""

    position: int
    run_id: str
    version: int


class Changes(NamedTuple):
    """An answer to a reader: what changed after its cursor, oldest first, and the cursor to go on from.

    `snapshot` is true if these are all runs of the topic, because the reader had no cursor or its cursor was of another
    epoch, or of a part that was dropped.
    """

    cursor: Cursor
    items: list[Change]
    snapshot: bool


class TopicIndex:
    """The runs of one topic. Keeps the newest `max_runs`."""

    __slots__ = ("_entries", "epoch", "floor", "max_runs", "position")

    def __init__(self, epoch: str, *, max_runs: int) -> None:
        self.epoch = epoch
        self.position = 0
        self.floor = 0  # the position of the last entry that was dropped because of max_runs
        self.max_runs = max_runs
        self._entries: dict[str, Change] = {}  # in the order of position

    def __len__(self) -> int:
        return len(self._entries)

    def tell(self, run_id: str, version: int) -> bool:
        """Record that a run has this version. A version that is not newer than the known one changes nothing."""
        known = self._entries.get(run_id)
        if known is not None and known.version >= version:
            return False
        self.put(Change(self.position + 1, run_id, version))
        return True

    def put(self, change: Change) -> None:
        """Record a change whose position, behind all others, is known."""
        self._entries.pop(change.run_id, None)
        self._entries[change.run_id] = change
        self.position = change.position
        while len(self._entries) > self.max_runs:
            self.floor = self._entries.pop(next(iter(self._entries))).position

    def forget(self, run_id: str) -> None:
        """Drop a run that is past its retention. Readers are not told."""
        self._entries.pop(run_id, None)

    def after(self, cursor: Cursor | None, *, limit: int) -> Changes:
        """What changed after the cursor: the oldest `limit` changes, so that a reader can go on from the last.

        Without a usable cursor it is a snapshot: the newest `limit` runs.
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
