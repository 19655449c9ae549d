"""Reads runs and streams over HTTP from another service."""

# Requests the native event streams of docs/protocol.md, sections 4 and 5. `protocol` decides what responses and events
# mean, without I/O; the clients carry its bytes.

from __future__ import annotations

try:
    import httpx  # noqa: F401
except ModuleNotFoundError as exc:  # pragma: no cover
    raise ModuleNotFoundError("the client needs httpx: pip install 'asgi_realtime[client]'") from exc

from asgi_realtime.client.asynchronous import RealtimeClient
from asgi_realtime.client.errors import ServerUnreachable, UnexpectedAnswer
from asgi_realtime.client.states import RunState
from asgi_realtime.client.subscription import Subscription
from asgi_realtime.client.synchronous import SyncRealtimeClient, SyncSubscription

__all__ = [
    "RealtimeClient",
    "RunState",
    "ServerUnreachable",
    "Subscription",
    "SyncRealtimeClient",
    "SyncSubscription",
    "UnexpectedAnswer",
]
