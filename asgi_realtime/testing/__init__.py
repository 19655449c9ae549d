"""For the tests of apps and of broker backends: a streaming client, a clock, faults, the conformance suite.

`AsgiClient` starts an ASGI app and gives its responses live, `FakeClock` moves the time of a `Realtime`, `Faults`
breaks connections. `driver.stream` is one request without more. The suite that a broker has to pass is in
`asgi_realtime.testing.conformance`, which needs pytest and hypothesis; the fixtures for pytest are in `plugin`.
"""

from __future__ import annotations

from asgi_realtime.testing.client import AsgiClient
from asgi_realtime.testing.clock import FakeClock, expired_token
from asgi_realtime.testing.driver import Response, StreamedResponse, stream
from asgi_realtime.testing.faults import Faults, Stall
from asgi_realtime.testing.sse import Event, EventParser

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
    "stream",
]
