"""An incremental parser of `text/event-stream`, as a browser reads it. It is that of the library's own client."""

from __future__ import annotations

from asgi_realtime.core.event_stream import Event, EventParser

__all__ = ["Event", "EventParser"]
