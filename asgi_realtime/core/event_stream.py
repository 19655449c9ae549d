"""An incremental parser of `text/event-stream` that behaves like a browser.

Feed it bytes as they arrive, split anywhere, and it returns the events that they complete. An event that no empty line
has ended is incomplete. Pure. Spec: WHATWG HTML, section 9.2.6 (interpreting an event stream).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

_LINE_END = re.compile(rb"\r\n|\r|\n")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Event:
    """One dispatched event."""

    event: str
    data: str
    id: str | None = None
    """The last event id at this event, possibly set by an earlier one. None: no event had an id yet."""
    retry: int | None = None
    """The reconnection time in this event, in milliseconds."""

    def json(self) -> Any:
        """Decode the data as JSON. Raises `ValueError`."""
        return json.loads(self.data)


class EventParser:
    """Parses one response. `comments`, `last_event_id` and `retry` hold what it has seen so far."""

    def __init__(self) -> None:
        self.comments: list[str] = []
        self.last_event_id: str | None = None
        self.retry: int | None = None
        self._partial: list[bytes] = []
        self._after_cr = False
        self._at_start = True
        self._data: list[str] = []
        self._event = ""
        self._id: str | None = None
        self._block_retry: int | None = None

    def feed(self, data: bytes) -> list[Event]:
        """Parse the next bytes; return the events that they complete."""
        if not data:
            return []
        if self._after_cr and data.startswith(b"\n"):
            data = data[1:]  # the second half of a CRLF whose CR has already ended the line
        self._after_cr = data.endswith(b"\r")
        lines = _LINE_END.split(data)
        self._partial.append(lines[0])  # joined once the line ends, so the cost of a long line stays linear
        if len(lines) == 1:
            return []
        lines[0] = b"".join(self._partial)
        self._partial = [lines.pop()]
        events = [self._line(line) for line in lines]
        return [event for event in events if event is not None]

    def _line(self, line: bytes) -> Event | None:
        if self._at_start:
            self._at_start = False
            line = line.removeprefix(_BOM)
        if not line:
            return self._dispatch()
        field, _, value = line.decode("utf-8", "replace").partition(":")
        self._field(field, value.removeprefix(" "))
        return None

    def _field(self, field: str, value: str) -> None:
        if field == "":
            self.comments.append(value)
        elif field == "data":
            self._data.append(value)
        elif field == "event":
            self._event = value
        elif field == "id" and "\0" not in value:
            self._id = value
        elif field == "retry" and value.isascii() and value.isdigit():
            self.retry = self._block_retry = int(value)

    def _dispatch(self) -> Event | None:
        self.last_event_id = self._id
        data, event, retry = self._data, self._event, self._block_retry
        self._data, self._event, self._block_retry = [], "", None
        if not data:
            return None
        return Event(event or "message", "\n".join(data), self.last_event_id, retry)
