"""The calls of `Realtime`, by subject: tasks and runs, streams, following runs, tokens."""

from __future__ import annotations

from asgi_realtime.calls.following import FollowCalls
from asgi_realtime.calls.runs import RunCalls
from asgi_realtime.calls.streams import StreamCalls
from asgi_realtime.calls.tokens import TokenCalls


class Calls(TokenCalls, FollowCalls, StreamCalls, RunCalls):  # the API reference shows the last class first
    """All of them."""
