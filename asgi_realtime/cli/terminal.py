"""Prints text from untrusted sources."""

from __future__ import annotations

import logging
import re
import sys
from typing import TextIO

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""C0 and C1, and the bidirectional overrides and isolates, which display text in another order (CVE-2021-42574)."""


def harmless(text: str, stream: TextIO | None = None) -> str:
    """Replace control characters if the text goes to a terminal; `stream` defaults to stdout.

    A terminal executes escape sequences: they set its title and colors, and write to the clipboard. Output to a file or
    another program stays unchanged.
    """
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text) if _is_terminal(stream or sys.stdout) else text


def print_line(text: str) -> None:
    print(harmless(text), flush=True)  # noqa: T201


class HarmlessFormatter(logging.Formatter):
    """For logs on stderr."""

    def format(self, record: logging.LogRecord) -> str:
        return harmless(super().format(record), sys.stderr)


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty()
