"""An incremental parser of `text/event-stream`, as a browser reads it.

Give it bytes as they arrive, cut anywhere; it gives back the events that they complete. An event that no empty line
has ended is not there. Pure. Spec: WHATWG HTML, section 9.2.6 (interpreting an event stream).
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
    """One event as it was fired."""

    event: str
    data: str
    id: str | None = None
    """The last event id as of this event, which may have come with an earlier one. None: there was none yet."""
    retry: int | None = None
    """The reconnection time that came with this event, in milliseconds."""

    def json(self) -> Any:
        """The data as JSON. Raises `ValueError` if it is something else."""
        return json.loads(self.data)


class EventParser:
    """Parses one response. `comments`, `last_event_id` and `retry` are what has been seen so far."""

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
        """Take the next bytes and return the events that they complete."""
        if not data:
            return []
        if self._after_cr and data.startswith(b"\n"):
            data = data[1:]  # the second half of a CRLF whose CR has ended the line already
        self._after_cr = data.endswith(b"\r")
        lines = _LINE_END.split(data)
        self._partial.append(lines[0])  # joined once its line ends, so a long one costs no more than its bytes
        if len(lines) == 1:
            return []
        lines[0] = b"".join(self._partial)
        self._partial = [lines.pop()]
        fired = [self._line(line) for line in lines]
        return [event for event in fired if event is not None]

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
