"""User input and output that several commands share: URLs, and text from untrusted sources."""

from __future__ import annotations

import logging
import re
import sys
from typing import TextIO
from urllib.parse import SplitResult, urlsplit

from asgi_realtime.core.errors import UsageError

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def split_url(url: str, expected: str) -> SplitResult:
    """The parts of an HTTP URL. Raises `UsageError` with what was expected."""
    try:
        parts = urlsplit(url)
        _ = parts.port
        (parts.hostname or "").encode("idna")  # what the resolver will do; UnicodeError is a ValueError
    except ValueError as exc:
        raise UsageError(f"{expected}; this is not a URL: {exc}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(expected)
    return parts


def harmless(text: str, stream: TextIO | None = None) -> str:
    """Replace control characters if the text goes to a terminal; `stream` defaults to stdout.

    A terminal executes escape sequences: they set its title and colors, and write to the clipboard. Output to a file or
    another program stays unchanged.
    """
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text) if _is_terminal(stream or sys.stdout) else text


class HarmlessFormatter(logging.Formatter):
    """For logs on stderr."""

    def format(self, record: logging.LogRecord) -> str:
        return harmless(super().format(record), sys.stderr)


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty()
