"""The chunk that every server publishes, and the reader of what came back.

A chunk is a JSON string of fixed size that names its own number and the time at which it was due, on the monotonic
clock that all processes of a Linux machine share. The same number is the event's id, so a lost, doubled, reordered or
damaged chunk shows in the text alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

PAYLOAD_BYTES = 100
"""Of one chunk as JSON, its quotes included."""

_PADDING = "x" * (PAYLOAD_BYTES - 2 - 8 - 1 - 19 - 1)
_EVENT = re.compile(
    rb'id: ?(?P<id>\d+)\r?\ndata: ?"(?P<seq>\d{8}) (?P<due>\d{19}) ' + _PADDING.encode() + rb'"\r?\n\r?\n'
    rb"|(?::[^\n]*\n|retry:[^\n]*\n)+\r?\n"
    rb"|(?:id:[^\n]*\n)?event: ?(?:end|reconnect)\r?\n(?:[^\r\n]+\r?\n)*\r?\n"
)
"""An event with a chunk, or what a server may say besides: comments, `retry:`, a named event at the end."""
FRAME_END = re.compile(rb'x"\r?\n\r?\n')
"""Where the frame of a chunk ends, to count chunks without reading them."""


def make_chunk(seq: int, due_ns: int) -> str:
    """Return the text of one chunk, without the quotes that make it JSON."""
    return f"{seq:08d} {due_ns:019d} {_PADDING}"


def make_text(seq: int, size: int) -> str:
    """Return a text that names its number and makes `size` bytes as JSON: for what is stored and not timed."""
    return f"{seq:08d}".ljust(size - 2, "x")


def parse_text(data: bytes, size: int) -> int | None:
    """Return the number in the JSON of such a text, or None if it is damaged."""
    number = data[1:9]
    seq = int(number) if number.isdigit() else -1
    return seq if data == b'"%b"' % make_text(seq, size).encode() else None


@dataclass(frozen=True, slots=True)
class Event:
    """One chunk as it came: its number, when it was due, and where its frame ended in the text."""

    seq: int
    due_ns: int
    end: int


def parse_events(text: bytes | bytearray) -> tuple[list[Event], int]:
    """Return the chunks in a decoded body and the number of bytes that are neither chunks nor allowed besides them."""
    events: list[Event] = []
    at = foreign = 0
    for match in _EVENT.finditer(text):
        foreign += match.start() - at
        at = match.end()
        if match["seq"] is None:
            continue
        if int(match["id"]) == int(match["seq"]):
            events.append(Event(int(match["seq"]), int(match["due"]), at))
        else:
            foreign += at - match.start()
    return events, foreign + len(text) - at
