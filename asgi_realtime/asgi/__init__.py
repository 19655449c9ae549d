"""HTTP for any SSE client: one route table, subscriptions, feeds, responses, health, the browser module."""

from __future__ import annotations

from asgi_realtime.asgi.app import RealtimeApp
from asgi_realtime.asgi.auth import RedactAccessToken
from asgi_realtime.asgi.error_handlers import realtime_error_handler, realtime_error_response
from asgi_realtime.asgi.middleware import RealtimeMiddleware

__all__ = [
    "RealtimeApp",
    "RealtimeMiddleware",
    "RedactAccessToken",
    "realtime_error_handler",
    "realtime_error_response",
]
