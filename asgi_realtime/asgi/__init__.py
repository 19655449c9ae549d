"""HTTP for any SSE client: one route table, subscriptions, feeds, responses, health."""

from __future__ import annotations

from asgi_realtime.asgi.app import RealtimeApp
from asgi_realtime.asgi.auth import RedactAccessToken
from asgi_realtime.asgi.middleware import RealtimeMiddleware

__all__ = ["RealtimeApp", "RealtimeMiddleware", "RedactAccessToken"]
