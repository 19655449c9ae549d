"""For tests of apps and of brokers: a streaming client, a clock, faults and the conformance suite.

`AsgiClient` starts an ASGI app and streams its responses live, `FakeClock` moves the time of a `Realtime`, and `Faults`
breaks connections. `asgi_realtime.testing.conformance` holds the suite that a broker must pass; it needs pytest and
hypothesis. The pytest fixtures are in `plugin`.
"""

from __future__ import annotations

from asgi_realtime.core.event_stream import Event, EventParser
from asgi_realtime.testing.client import AsgiClient
from asgi_realtime.testing.clock import FakeClock, expired_token
from asgi_realtime.testing.driver import Response, StreamedResponse
from asgi_realtime.testing.faults import Faults, Stall

__all__ = [
    "AsgiClient",
    "Event",
    "EventParser",
    "FakeClock",
    "Faults",
    "Response",
    "Stall",
    "StreamedResponse",
    "expired_token",
]
