"""Prints text from untrusted sources."""

from __future__ import annotations

import logging
import re
import sys
from typing import TextIO

_CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f]"
)
"""C0 and C1; the bidirectional marks, overrides and isolates, which display text in another order (CVE-2021-42574); and
the invisible format characters, which hide text, but not the joiners that emoji and Persian are written with."""

_SURROGATE = re.compile("[\ud800-\udfff]")


def harmless(text: str, stream: TextIO | None = None) -> str:
    """Replace control characters if the text goes to a terminal; `stream` defaults to stdout.

    A terminal executes escape sequences: they set its title and colors, and write to the clipboard. Output to a file or
    another program stays unchanged.
    """
    text = whole(text)
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text) if _is_terminal(stream or sys.stdout) else text


def whole(text: str) -> str:
    """Join halves of characters, and replace halves that are alone, which no output can encode."""
    if _SURROGATE.search(text) is None:
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def split_half(text: str) -> tuple[str, str]:
    """The text, and the first half of a character if the text ends with one: the next chunk can have the rest."""
    return (text[:-1], text[-1]) if "\ud800" <= text[-1:] <= "\udbff" else (text, "")


def print_line(text: str) -> None:
    print(harmless(text), flush=True)  # noqa: T201


class HarmlessFormatter(logging.Formatter):
    """For logs on stderr."""

    def format(self, record: logging.LogRecord) -> str:
        return harmless(super().format(record), sys.stderr)


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty()
