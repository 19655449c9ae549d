"""`doctor URL`: finds what stands between a client and the streams of a server, and says what cures it.

It asks as a browser does. What it sees is the way from this machine: proxies that others pass are not on it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from asgi_realtime.cli.findings import Finding, Mark
from asgi_realtime.cli.terminal import harmless, split_url
from asgi_realtime.core.config import Cors
from asgi_realtime.core.errors import UsageError


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="find what keeps streams from a browser",
        description="Ask a server as a browser does: health, HTTP version, a stream, compression, clocks, CORS.",
    )
    parser.add_argument(
        "url", metavar="URL", help="where the Realtime is mounted, such as https://example.com/realtime"
    )
    parser.add_argument("--origin", metavar="ORIGIN", help="check CORS for pages of this origin: https://app.example")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    expected = "URL must be where the Realtime is mounted, such as https://example.com/realtime"
    split_url(given.url, expected)
    if "?" in given.url or "#" in given.url:
        raise UsageError(expected)
    if given.origin is not None:
        Cors([given.origin])  # raises for what no browser sends
    try:
        from asgi_realtime.cli.checks import examine
    except ModuleNotFoundError as exc:
        raise UsageError("doctor needs httpx: pip install 'asgi_realtime[client]'") from exc
    worst = False
    paint = _painter()
    for finding in _until_the_end(examine(given.url.rstrip("/"), given.origin)):
        print(paint(finding), flush=True)  # noqa: T201
        worst = worst or finding.mark is Mark.BAD
    return 1 if worst else 0


def _until_the_end(findings: Iterator[Finding]) -> Iterator[Finding]:
    for finding in findings:
        yield finding
        if finding.ends:
            return


def _painter() -> Callable[[Finding], str]:
    signs = _can_show("".join(mark.value[0] for mark in Mark))
    colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ

    def paint(finding: Finding) -> str:
        sign, colour = finding.mark.value if signs else (finding.mark.name, finding.mark.value[1])
        told = f"\033[{colour}m{sign}\033[0m" if colours else sign
        return f"{told} {harmless(finding.text)}" + (f"\n    {harmless(finding.cure)}" if finding.cure else "")

    return paint


def _can_show(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
