"""Lines out of a body that comes in parts, wherever the parts were cut.

For bodies of one JSON value a line (https://github.com/ndjson/ndjson-spec). A line break is LF, with or without a CR
before it. Pure: bytes in, lines out; what is held is never more than one line of the allowed length and one part.
"""

from __future__ import annotations

from collections.abc import Iterator

from asgi_realtime.core.errors import LimitExceeded


class LineSplitter:
    """Gives the lines of a body without their line breaks. Blank ones are no lines and are passed over."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held = bytearray()  # the begin of a line whose rest has not come yet

    def feed(self, part: bytes) -> Iterator[bytes]:
        """The lines that end in this part. To be iterated to its end before the next.

        Raises `LimitExceeded` (413) as soon as a line is too long, whether its end has come or not, after the lines
        before it were given.
        """
        start = 0
        while (stop := part.find(b"\n", start)) >= 0:
            yield from self._line(part[start:stop])
            start = stop + 1
        self._hold(part[start:])

    def rest(self) -> Iterator[bytes]:
        """What came after the last line break, once the body has ended."""
        return self._line(b"")

    def _line(self, last: bytes) -> Iterator[bytes]:
        self._hold(last)
        line = bytes(self._held).strip(b" \t\r")
        self._held.clear()
        if line:
            yield line

    def _hold(self, data: bytes) -> None:
        size = len(self._held) + len(data)
        if size > self._max_bytes and size - (data or self._held).endswith(b"\r") > self._max_bytes:
            raise LimitExceeded(f"a line is at least {size} bytes, limit {self._max_bytes}", status=413)
        self._held += data
