"""What the objects of the memory broker cost, in bytes of process memory.

Text and bytes are measured. The constants are what the objects around them take on 64-bit CPython, rounded up: dict
slots, tuples, integers, and the entries of schedules.
"""

from __future__ import annotations

from collections.abc import Iterable
from sys import getsizeof

from asgi_realtime.core.log import Log
from asgi_realtime.core.runs import StoredRecord, content_bytes

_RUN = 2048
"""A run with its record, its own topic and its due times."""

_TOPIC = 704
"""A topic that lists only this run. Listing it in a topic of other runs costs a quarter."""

_STREAM = 1024
"""A stream or an input."""

ENTRY = 72
"""A chunk, in addition to its frame."""

PRODUCER = 240
"""The count of a producer. Each append over HTTP has its own."""

MARK = 288
"""The mark of a commit."""

_CLAIM = 320
"""A claim, in addition to its key and its value."""


APPEND_COST = ENTRY + 32
"""The most that a chunk costs in addition to its JSON, with its frame."""

NEW_STREAM_COST = _STREAM + PRODUCER
"""The most that an append costs in addition to its chunks."""


def record_cost(record: StoredRecord, topics: Iterable[str]) -> int:
    """A run without its streams and marks. `topics`: all that list it."""
    return _RUN + content_bytes(record) + sum(_TOPIC + getsizeof(topic) for topic in topics)


def stream_cost(log: Log) -> int:
    """A stream with its retained chunks; nothing for one that was only read."""
    if log.next == 0:
        return 0
    return _STREAM + log.size + ENTRY * (log.next - log.first) + PRODUCER * log.producers


def claim_cost(key: str, value: str) -> int:
    return _CLAIM + getsizeof(key) + getsizeof(value)
