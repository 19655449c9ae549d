"""Runs an app without a server for its tests, and holds the conformance suite for brokers."""

from __future__ import annotations

from asgi_realtime.core.event_stream import Event, EventParser
from asgi_realtime.testing.client import AsgiClient
from asgi_realtime.testing.clock import FakeClock, expired_token
from asgi_realtime.testing.faults import Faults, Stall
from asgi_realtime.testing.responses import Response, StreamedResponse

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
