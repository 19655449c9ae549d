"""`RealtimeMiddleware`: serves a `Realtime` under a path of any ASGI app, and starts and stops it with the app.

The `Realtime` starts before the host and stops after it, so the host can publish in its start-up and shutdown. It is
pure ASGI: the host's `send` and `receive` are not wrapped for HTTP.

**The lifespan** is the host's, and the middleware watches its messages. INITIAL: nothing was received. STARTING:
`lifespan.startup` was received, and the `Realtime` has started. RUNNING: the start-up is complete. STOPPING:
`lifespan.shutdown` was received. OVER: the last message was sent, and the `Realtime` has stopped. A host can leave the
protocol early, because it does not support it (Django raises) or returns after its start-up. The middleware then
continues alone from the state it is in.
"""

from __future__ import annotations

import logging
from enum import Enum, auto
from typing import Any

from asgi_realtime.asgi.auth import redact_query
from asgi_realtime.asgi.connection import CutOff, break_connection
from asgi_realtime.asgi.host import App, HostApp, Message, Receive, Scope, Send
from asgi_realtime.core.errors import InvalidConfiguration
from asgi_realtime.loop.logger import logger

_MAX_MIDDLEWARE = 50  # an app can have an attribute `app` without end


class RealtimeMiddleware:
    """`app.add_middleware(RealtimeMiddleware, realtime=realtime)`, or `RealtimeMiddleware(app, realtime)`."""

    def __init__(self, app: App, realtime: HostApp, path: str = "/realtime") -> None:
        if not path.startswith("/") or not path.strip("/") or any(mark in path for mark in "?#*{}%"):
            raise InvalidConfiguration(
                f"path is {path!r}; it must start with '/' and be a plain prefix, such as '/realtime'"
            )
        _check(app, realtime)
        self.app = app
        self.realtime = realtime
        self.path = path.rstrip("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _Lifespan(self.realtime, receive, send).run(self.app, scope)
        elif scope["type"] in ("http", "websocket") and self._is_ours(scope):
            response = await self.realtime.respond(self._inner(scope), receive)
            await response(scope, receive, send)
        else:
            try:
                await self.app(scope, receive, send)
            except CutOff:  # `realtime.response` in a framework that iterates it
                await break_connection(scope, receive, send)

    def _inner(self, scope: Scope) -> Scope:
        """The scope for the `Realtime`. Nothing retains it once there is a response."""
        inner = {**scope, "root_path": scope.get("root_path", "").rstrip("/") + self.path}
        redact_query(scope)  # the server's access log reads this one
        return inner

    def _is_ours(self, scope: Scope) -> bool:
        path: str = scope["path"]
        root_path: str = scope.get("root_path", "").rstrip("/")
        if root_path and (path == root_path or path.startswith(root_path + "/")):
            path = path[len(root_path) :]
        return path == self.path or path.startswith(self.path + "/")


def _check(app: Any, realtime: Any) -> None:
    """Raises `InvalidConfiguration` for what would be accepted and never work."""
    usage = "use RealtimeMiddleware(app, realtime), with the whole app and a Realtime"
    if isinstance(realtime, type) or not hasattr(realtime, "start"):
        raise InvalidConfiguration(f"realtime is {_described(realtime)}; {usage}")
    if not callable(app) or isinstance(app, type) or app is realtime:
        raise InvalidConfiguration(f"app is {_described(app)}; {usage}")
    for _ in range(_MAX_MIDDLEWARE):
        if type(getattr(app, "__self__", None)).__module__.startswith("litestar.routes"):
            raise InvalidConfiguration(
                "RealtimeMiddleware is in Litestar's middleware=, which gets no lifespan and only requests to its own"
                " routes; wrap the app instead: RealtimeMiddleware(Litestar(…), realtime)"
            )
        app = getattr(app, "app", None)


def _described(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


class _State(Enum):
    INITIAL = auto()
    STARTING = auto()
    RUNNING = auto()
    STOPPING = auto()
    OVER = auto()


_TRANSITIONS: dict[_State, frozenset[_State]] = {
    _State.INITIAL: frozenset({_State.STARTING}),
    _State.STARTING: frozenset({_State.RUNNING, _State.STOPPING, _State.OVER}),
    _State.RUNNING: frozenset({_State.STOPPING, _State.OVER}),
    _State.STOPPING: frozenset({_State.OVER}),
    _State.OVER: frozenset(),
}

_LAST = frozenset({"lifespan.startup.failed", "lifespan.shutdown.complete", "lifespan.shutdown.failed"})


class _StartFailed(Exception):
    """Makes the host leave its lifespan when the `Realtime` could not start."""


class _Lifespan:
    """One conversation with the server; see the top of the module."""

    def __init__(self, realtime: HostApp, receive: Receive, send: Send) -> None:
        self._realtime = realtime
        self._receive = receive
        self._send = send
        self._state = _State.INITIAL

    def _move(self, state: _State) -> None:
        assert state in _TRANSITIONS[self._state], (self._state, state)
        self._state = state

    async def run(self, app: App, scope: Scope) -> None:
        try:
            await app(scope, self.receive, self.send)
        except _StartFailed:
            return
        except Exception:
            if self._state is _State.OVER:
                raise
            if self._state in (_State.RUNNING, _State.STOPPING):
                await self._stop()
                raise
            # Servers continue without a lifespan then. A host that received the message possibly meant to fail.
            level = logging.WARNING if self._state is _State.STARTING else logging.DEBUG
            logger.log(level, "the host app raised on lifespan; serving without its start-up", exc_info=True)
        await self._continue_alone()

    async def receive(self) -> Message:
        """The host's `receive`."""
        message = await self._receive()
        if message["type"] == "lifespan.startup" and self._state is _State.INITIAL:
            self._move(_State.STARTING)
            await self._start()
        elif message["type"] == "lifespan.shutdown" and self._state in (_State.STARTING, _State.RUNNING):
            self._move(_State.STOPPING)
        return message

    async def send(self, message: Message) -> None:
        """The host's `send`."""
        if not message["type"].startswith("lifespan."):  # a host that takes every scope for a request
            raise RuntimeError(f"the host app sent {message['type']} on lifespan")
        if self._state is _State.INITIAL:
            await self.receive()
        if self._state is _State.OVER:
            return
        if message["type"] in _LAST:
            await self._stop()
            self._move(_State.OVER)
        elif self._state is _State.STARTING:
            self._move(_State.RUNNING)
        await self._send(message)

    async def _continue_alone(self) -> None:
        try:
            if self._state is _State.INITIAL:
                await self.receive()
        except _StartFailed:
            return
        if self._state is _State.STARTING:
            await self.send({"type": "lifespan.startup.complete"})
        if self._state is _State.RUNNING:
            await self.receive()
        await self.send({"type": "lifespan.shutdown.complete"})  # unless the host has sent its last message

    async def _start(self) -> None:
        try:
            await self._realtime.start()
        except Exception as exc:
            logger.exception("start failed")
            self._move(_State.OVER)
            await self._send({"type": "lifespan.startup.failed", "message": f"{type(exc).__name__}: {exc}"})
            raise _StartFailed from exc

    async def _stop(self) -> None:
        try:
            await self._realtime.stop()
        except Exception:
            logger.exception("stop failed")
