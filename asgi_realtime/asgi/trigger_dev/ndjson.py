"""Split a body of newline-delimited JSON into lines, however its parts were cut (https://github.com/ndjson/ndjson-spec).

A line break is LF, optionally after CR. Pure: bytes in, lines out. The splitter never holds more than one line of the
allowed length and one part.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from asgi_realtime.asgi.trigger_dev.decoding import BOM
from asgi_realtime.core.errors import LimitExceeded

_BLANK_LINES = re.compile(rb"[ \t\r\n]*\n")
"""Skipped at once: one by one, a MiB of them held the event loop for a second."""


class LineSplitter:
    """Yields the lines of a body without their line breaks, and skips blank lines."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._partial = bytearray()  # a line that continues in the next part

    def feed(self, part: bytes) -> Iterator[bytes]:
        """The lines that end in this part. Exhaust the iterator before feeding the next part.

        Raises `LimitExceeded` (413) as soon as a line is too long, even if its end has not arrived; earlier lines are
        yielded first.
        """
        start = 0
        while (stop := part.find(b"\n", start)) >= 0:
            if not self._partial and (blank := _BLANK_LINES.match(part, start)):
                start = blank.end()
                continue
            yield from self._line(part[start:stop])
            start = stop + 1
        self._extend(part[start:])

    def rest(self) -> Iterator[bytes]:
        """The line after the last line break, once the body has ended."""
        return self._line(b"")

    def _line(self, last: bytes) -> Iterator[bytes]:
        self._extend(last)
        line = bytes(self._partial).removeprefix(BOM).strip(b" \t\r")
        self._partial.clear()
        if line:
            yield line

    def _extend(self, data: bytes) -> None:
        size = len(self._partial) + len(data)
        if size > self._max_bytes and size - (data or self._partial).endswith(b"\r") > self._max_bytes:
            raise LimitExceeded(f"a line is at least {size} bytes, limit {self._max_bytes}", status=413)
        self._partial += data
