"""The chunks that every server publishes, and their parser.

A chunk is a JSON string of fixed size with its number and the time at which it was due, on the monotonic clock that all
processes of a Linux machine share. The number is also the event's id, so the text alone shows whether a chunk was lost,
duplicated, reordered or damaged.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

PAYLOAD_BYTES = 100
"""The size of one chunk as JSON, including its quotes."""

_PADDING = "x" * (PAYLOAD_BYTES - 2 - 8 - 1 - 19 - 1)
_EVENT = re.compile(
    rb'(?:id: ?(?P<id>\d+)\r?\n)?data: ?"(?P<seq>\d{8}) (?P<due>\d{19}) '
    + _PADDING.encode()
    + rb'"\r?\n(?:id: ?(?P<id_after>\d+)\r?\n)?\r?\n'
    rb"|(?::[^\n]*\n|retry:[^\n]*\n)+(?:\r?\n)?"
    rb"|(?:id:[^\n]*\n)?event: ?(?:end|reconnect)\r?\n(?:[^\r\n]+\r?\n)*\r?\n"
)
"""An event with a chunk, or other allowed output: comments, `retry:`, a named event at the end."""
FRAME_END = re.compile(rb'x"\r?\n(?:id: ?\d+\r?\n)?\r?\n')
"""The end of the frame of a chunk, to count chunks without parsing them."""


def make_chunk(seq: int, due_ns: int) -> str:
    """Return the text of one chunk, without its JSON quotes."""
    return f"{seq:08d} {due_ns:019d} {_PADDING}"


def make_text(seq: int, size: int) -> str:
    """Return a text with its number that is `size` bytes as JSON. It is stored and not timed, so it has no time."""
    return f"{seq:08d}".ljust(size - 2, "x")


def parse_text(data: bytes, size: int) -> int | None:
    """Return the number in the JSON of a text from `make_text`, or None if it is damaged."""
    number = data[1:9]
    seq = int(number) if number.isdigit() else -1
    return seq if data == b'"%b"' % make_text(seq, size).encode() else None


@dataclass(frozen=True, slots=True)
class Event:
    """One received chunk: its number, when it was due, and where its frame ends in the text."""

    seq: int
    due_ns: int
    end: int


def parse_events(text: bytes | bytearray) -> tuple[list[Event], int]:
    """Return the chunks in a decoded body, and the number of bytes that are neither chunks nor other allowed output."""
    events: list[Event] = []
    at = foreign = 0
    for match in _EVENT.finditer(text):
        foreign += match.start() - at
        at = match.end()
        if match["seq"] is None:
            continue
        if int(match["id"] or match["id_after"] or -1) == int(match["seq"]):
            events.append(Event(int(match["seq"]), int(match["due"]), at))
        else:
            foreign += at - match.start()
    return events, foreign + len(text) - at
