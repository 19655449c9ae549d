"""What commands read from a user and show to one: addresses, and text that others wrote."""

from __future__ import annotations

import logging
import re
import sys
from typing import TextIO
from urllib.parse import SplitResult, urlsplit

from asgi_realtime.core.errors import UsageError

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def split_url(url: str, expected: str) -> SplitResult:
    """The parts of an http address. Raises `UsageError`, which says what was expected."""
    try:
        parts = urlsplit(url)
        _ = parts.port
        (parts.hostname or "").encode("idna")  # as it is asked for in the end; UnicodeError is a ValueError
    except ValueError as exc:
        raise UsageError(f"{expected}; this one is no URL: {exc}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(expected)
    return parts


def harmless(text: str, stream: TextIO | None = None) -> str:
    """Text for a terminal, which would obey its escape sequences: they set titles, colours, the clipboard. What goes
    into a file or another program stays as it is. `stream` is where it goes: stdout if it is None."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text) if _is_terminal(stream or sys.stdout) else text


class HarmlessFormatter(logging.Formatter):
    """Of a log that goes to stderr."""

    def format(self, record: logging.LogRecord) -> str:
        return harmless(super().format(record), sys.stderr)


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty()
