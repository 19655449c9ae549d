"""What a poll of a run feed requests.

A poll carries everything that the server knows about the client: what it has, in the handle and the offset, and when it
got its last response, in the `cursor`. So any process can respond to it, also after a restart.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from asgi_realtime.asgi.request import EVENT_STREAM, Request
from asgi_realtime.asgi.trigger_dev.shapes import ShapeCursor
from asgi_realtime.core.errors import InvalidRequest, shown

BURST = 5
"""Responses in quick succession before they are spaced out. A run changes several times when it starts, and clients see
that without delay."""

QUICK_MS = 1000
"""The longest time between two responses in quick succession."""

_OFFSET = re.compile(r"[0-9]{1,18}_[0-9]{1,18}")
_PACE = re.compile(r"([0-9]{1,15})-([0-9]{1,9})")


class Pace(NamedTuple):
    """When a client was last sent a response, and how many responses preceded that one in quick succession.

    Clients return it as the `cursor`, which Electric only uses to make URLs unique.
    """

    at_ms: int = 0
    quick: int = 0

    def __str__(self) -> str:
        return f"{self.at_ms}-{self.quick}"

    @classmethod
    def parse(cls, text: str) -> Pace:
        """Any other cursor starts a new pace."""
        found = _PACE.fullmatch(text)
        return cls(int(found[1]), int(found[2])) if found else cls()

    def next(self, now_ms: int) -> Pace:
        return Pace(now_ms, self.quick + 1 if abs(now_ms - self.at_ms) < QUICK_MS else 0)

    def delay_s(self, now_ms: int, spacing_s: float) -> float:
        """How long to delay the next response; 0 within a burst. At most the spacing, even if clocks differ."""
        if self.quick < BURST:
            return 0.0
        return min(max(self.at_ms / 1000 + spacing_s - now_ms / 1000, 0.0), spacing_s)


class ShapeRequest(NamedTuple):
    """`cursor` is None for a snapshot, and for a cursor that this server did not make."""

    snapshot: bool
    cursor: ShapeCursor | None
    live: bool
    pace: Pace


def read_shape_request(request: Request) -> ShapeRequest:
    """Read the query. Raises `InvalidRequest`."""
    offset = request.query("offset")
    if offset is None:
        raise InvalidRequest(
            f"offset is missing; send the header `Accept: {EVENT_STREAM}` for events, or ?offset=-1 to poll"
        )
    live = request.query("live") == "true"
    pace = Pace.parse(request.query("cursor") or "")
    if offset == "-1":
        return ShapeRequest(True, None, live, pace)
    if not _OFFSET.fullmatch(offset):
        raise InvalidRequest(f"offset is {shown(offset)}; allowed are -1 and the offset of the last response")
    return ShapeRequest(False, ShapeCursor.parse(request.query("handle") or "", offset), live, pace)
