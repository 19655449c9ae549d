"""`RealtimeMiddleware`: serves a `Realtime` under a path of any ASGI app, and starts and stops it with the app.

It starts before the host's own start-up and stops when the host's shutdown is through, so the host may publish in both.
A host that does not speak the lifespan protocol (Django raises) has it answered here. It is pure ASGI: nothing of the
host's `send` and `receive` is wrapped on http.
"""

from __future__ import annotations

import logging

from asgi_realtime.asgi.auth import redact_query
from asgi_realtime.asgi.host import App, HostApp, Message, Receive, Scope, Send
from asgi_realtime.core.errors import InvalidConfiguration

logger = logging.getLogger("asgi_realtime")

_LAST = frozenset({"lifespan.startup.failed", "lifespan.shutdown.complete", "lifespan.shutdown.failed"})


class RealtimeMiddleware:
    """`app.add_middleware(RealtimeMiddleware, realtime=realtime)`, or `RealtimeMiddleware(app, realtime)`."""

    def __init__(self, app: App, realtime: HostApp, path: str = "/realtime") -> None:
        if not path.startswith("/") or not path.strip("/") or any(mark in path for mark in "?#"):
            raise InvalidConfiguration(
                f"path is {path!r}; it must begin with '/' and name a prefix, such as '/realtime'"
            )
        self.app = app
        self.realtime = realtime
        self.path = path.rstrip("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _Lifespan(self.realtime, receive, send).run(self.app, scope)
        elif scope["type"] in ("http", "websocket") and self._is_ours(scope):
            inner = {**scope, "root_path": scope.get("root_path", "").rstrip("/") + self.path}
            redact_query(scope)  # this is the one that the server's access log reads
            await self.realtime(inner, receive, send)
        else:
            await self.app(scope, receive, send)

    def _is_ours(self, scope: Scope) -> bool:
        path: str = scope["path"]
        root_path: str = scope.get("root_path", "").rstrip("/")
        if root_path and (path == root_path or path.startswith(root_path + "/")):
            path = path[len(root_path) :]
        return path == self.path or path.startswith(self.path + "/")


class _StartFailed(Exception):
    """Takes the host out of its lifespan when ours could not start."""


class _Lifespan:
    """One conversation with the server, led by the host and listened to."""

    def __init__(self, realtime: HostApp, receive: Receive, send: Send) -> None:
        self._realtime = realtime
        self._receive = receive
        self._send = send
        self._begun = False  # lifespan.startup was received
        self._complete = False  # the host answered it
        self._ending = False  # lifespan.shutdown was received
        self._over = False  # the last message was sent

    async def run(self, app: App, scope: Scope) -> None:
        try:
            await app(scope, self.receive, self.send)
        except _StartFailed:
            return
        except Exception:
            if self._over:
                raise
            if self._complete:
                await self._stop()
                raise
            # Servers go on in this case. If the host took the message it may have meant to fail, which it should say.
            level = logging.WARNING if self._begun else logging.DEBUG
            logger.log(level, "the host app raised on lifespan; serving without its start-up", exc_info=True)
        if not self._over:  # a host may also answer the start-up and return
            await self._alone()

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "lifespan.startup" and not self._begun:
            self._begun = True
            await self._start()
        self._ending = message["type"] == "lifespan.shutdown"
        return message

    async def send(self, message: Message) -> None:
        if self._over:
            return
        if message["type"] in _LAST:
            await self._stop()
            self._over = True
        else:
            self._complete = True
        await self._send(message)

    async def _alone(self) -> None:
        try:
            if not self._begun:
                await self.receive()
        except _StartFailed:
            return
        if not self._complete:
            await self.send({"type": "lifespan.startup.complete"})
        if not self._ending:
            await self._receive()
        await self.send({"type": "lifespan.shutdown.complete"})

    async def _start(self) -> None:
        try:
            await self._realtime.start()
        except Exception as exc:
            logger.exception("start failed")
            self._over = True
            await self._send({"type": "lifespan.startup.failed", "message": f"{type(exc).__name__}: {exc}"})
            raise _StartFailed from exc

    async def _stop(self) -> None:
        try:
            await self._realtime.stop()
        except Exception:
            logger.exception("stop failed")
