"""One request to an ASGI app, with as little in between as possible: tests make tens of thousands of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import anyio

from asgi_realtime.asgi.host import App, Message
from tests.inprocess import GUARD_S
from tests.security.mutations import Sent


@dataclass(slots=True)
class Received:
    """What the app sent."""

    starts: list[Message] = field(default_factory=list)
    body: bytearray = field(default_factory=bytearray)
    ended: bool = False

    @property
    def status(self) -> int:
        return int(self.starts[0]["status"]) if self.starts else 0

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.starts[0]["headers"]) if self.starts else {}

    @property
    def raw(self) -> bytes:
        """Everything that reaches the client."""
        headers = [name + b": " + value for start in self.starts for name, value in start["headers"]]
        return b"\n".join((*headers, bytes(self.body)))


async def exchange(app: App, request: Sent) -> Received:
    """Send a request, and disconnect as soon as there is a first part of a response.

    A body that is cut off disconnects before its last part. Raises what the app raises.
    """
    received = Received()
    answered = anyio.Event()
    parts = list(request.parts)

    async def receive() -> Message:
        if parts:
            part = parts.pop(0)
            if parts or not request.cut:
                return {"type": "http.request", "body": part, "more_body": bool(parts)}
        if not request.cut:
            await answered.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            received.starts.append(message)
            return
        assert received.starts, "a body before the start of the response"
        assert not received.ended, "a body after the end of the response"
        received.body += message.get("body", b"")
        received.ended = not message.get("more_body", False)
        answered.set()

    with anyio.fail_after(GUARD_S):
        await app(_scope(request), receive, send)
    return received


def _scope(request: Sent) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": request.path,
        "raw_path": quote(request.path, errors="replace").encode(),
        "root_path": "",
        "query_string": request.query,
        "headers": list(request.headers),
        "client": ("127.0.0.1", 50000),
        "server": ("127.0.0.1", 8000),
    }
