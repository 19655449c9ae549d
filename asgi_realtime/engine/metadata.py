"""The metadata and the tags of a run, as the code inside the run sees and changes them.

Both show a view: the record as it was last stored, with the changes that still wait on top. Storing a change reveals
what other processes have changed, and takes back a change that no longer fits into a limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from asgi_realtime.core.chunks import decode, encode_value
from asgi_realtime.core.config import Limits
from asgi_realtime.core.errors import shown
from asgi_realtime.core.metadata import (
    Append,
    Delete,
    Increment,
    Operation,
    Remove,
    Replace,
    Set,
    apply_operations,
    check_size,
    encode_metadata,
    most_added,
    normalize_value,
)
from asgi_realtime.core.names import check_tags
from asgi_realtime.core.run_changes import MetadataChanged, TagsAdded
from asgi_realtime.core.runs import StoredRecord
from asgi_realtime.engine.changes import ChangeBuffer


class Metadata:
    """Small JSON data of a run that its subscribers see. Values are converted to what their JSON form decodes to.

    All operations are sync, thread-safe, and take effect in order; increments and appends of several processes add up.
    They raise `UsageError` for a bad key or value, `LimitExceeded` for more than `limits.metadata_bytes`, and
    `RunEnded` once the run is over; a refused operation changes nothing.
    """

    __slots__ = ("_buffer", "_limit_bytes", "_most_bytes", "_view")

    def __init__(self, record: StoredRecord, buffer: ChangeBuffer, *, limit_bytes: int) -> None:
        self._view = record.metadata
        self._buffer = buffer
        self._limit_bytes = limit_bytes
        self._most_bytes = limit_bytes
        """The encoded view has at most this length; at least the limit if it is unknown."""
        buffer.on_stored.append(self._update)

    def __repr__(self) -> str:
        return f"<Metadata {self._view!r}>"

    def current(self) -> dict[str, Any]:
        """All metadata, as a copy: what is stored, as far as this process knows, and what waits to be stored."""
        copied: dict[str, Any] = decode(encode_value(self._view))
        return copied

    def get(self, key: str, default: Any = None) -> Any:
        """The value of one key, as a copy."""
        return normalize_value(self._view[key]) if key in self._view else default

    def set(self, key: str, value: Any) -> None:
        """Set a key."""
        self._change(Set(key, self._normalized(key, value)))

    def delete(self, key: str) -> None:
        """Remove a key, if it exists."""
        self._change(Delete(key))

    def append(self, key: str, value: Any) -> None:
        """Append to a list; a missing key becomes a list."""
        self._change(Append(key, self._normalized(key, value)))

    def remove(self, key: str, value: Any) -> None:
        """Remove all equal elements from a list."""
        self._change(Remove(key, self._normalized(key, value)))

    def increment(self, key: str, by: float = 1) -> None:
        """Add to a number; a missing key counts from 0."""
        self._change(Increment(key, by))

    def decrement(self, key: str, by: float = 1) -> None:
        """Subtract from a number; a missing key counts from 0."""
        self._change(Increment(key, -by))

    def replace(self, value: dict[str, Any]) -> None:
        """Replace all metadata."""
        self._change(Replace(normalize_value(value, f"metadata of run {self._buffer.run_id!r}")))

    async def flush(self) -> None:
        """Store all changes now. Raises `RunNotFound`, and `BrokerUnavailable`, after which the changes still wait."""
        await self._buffer.flush()

    def _normalized(self, key: str, value: Any) -> Any:
        return normalize_value(value, f"metadata key {shown(key)} of run {self._buffer.run_id!r}")

    def _change(self, operation: Operation) -> None:
        with self._buffer.lock:
            view = apply_operations(self._view, [operation], strict=True)
            added = most_added(operation)
            most_bytes = self._limit_bytes if added is None else self._most_bytes + added
            if most_bytes >= self._limit_bytes:
                encoded = encode_metadata(view)
                check_size(encoded, self._limit_bytes)
                most_bytes = len(encoded)
            self._buffer.add(MetadataChanged((operation,)))
            self._view, self._most_bytes = view, most_bytes

    def _update(self, record: StoredRecord) -> None:
        with self._buffer.lock:
            changes = [change for change in self._buffer.pending() if isinstance(change, MetadataChanged)]
            waiting = [operation for change in changes for operation in change.operations]
            self._view, self._most_bytes = apply_operations(record.metadata, waiting, strict=False), self._limit_bytes


class Tags:
    """The tags of a run: labels by which lists of runs are found. An iterable of strings."""

    __slots__ = ("_buffer", "_limits", "_view")

    def __init__(self, record: StoredRecord, buffer: ChangeBuffer, *, limits: Limits) -> None:
        self._view = record.tags
        self._buffer = buffer
        self._limits = limits
        buffer.on_stored.append(self._update)

    def __repr__(self) -> str:
        return f"<Tags {', '.join(self._view)}>"

    def __iter__(self) -> Iterator[str]:
        return iter(self._view)

    def __contains__(self, tag: object) -> bool:
        return tag in self._view

    def __len__(self) -> int:
        return len(self._view)

    def add(self, *tags: str) -> None:
        """Add tags, to be stored within 50 ms. Sync and thread-safe.

        Raises `UsageError` for a bad tag, `LimitExceeded` for too many, and `RunEnded`; none of them is added then.
        """
        with self._buffer.lock:
            view = check_tags((*self._view, *tags), self._limits)
            self._buffer.add(TagsAdded(check_tags(tags, self._limits)))
            self._view = view

    def _update(self, record: StoredRecord) -> None:
        with self._buffer.lock:
            waiting = [tag for change in self._buffer.pending() if isinstance(change, TagsAdded) for tag in change.tags]
            self._view = tuple(dict.fromkeys((*record.tags, *waiting)))
