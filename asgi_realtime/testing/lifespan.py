"""Drives the lifespan of an ASGI app as a server does. Spec: ASGI, lifespan protocol 2.0.

It runs in a separate task, so that a fixture can start it in one task and stop it in another.
"""

from __future__ import annotations

import contextvars
from collections.abc import Awaitable, Callable
from typing import Any

import anyio

from asgi_realtime.asgi.host import App, Message
from asgi_realtime.loop.failures import is_failure
from asgi_realtime.loop.supervisor import Supervisor
from asgi_realtime.loop.waiting import at_most
from asgi_realtime.testing.driver import LEAVE_S


class Lifespan:
    """Starts and stops an app. `state` is what its start-up provides to its requests."""

    def __init__(self, app: App) -> None:
        self.state: dict[str, Any] = {}
        self._app = app
        self._supported = False  # the app received the first message, so it supports lifespans
        self._stopping = anyio.Event()
        self._started = anyio.Event()
        self._over = anyio.Event()
        self._error: BaseException | None = None
        self._calls: set[anyio.Event] = set()
        self._supervisor = Supervisor(context=contextvars.copy_context(), drain=self._over.wait)

    async def start(self, timeout: float | None) -> None:
        """Raise what the start-up raises, or `RuntimeError` with its message. An app without a lifespan starts too."""
        self._supervisor.start()
        self._supervisor.spawn_detached(self._run)
        try:
            with at_most(timeout, lambda: f"the app did not start within {timeout:g} s"):
                await self._started.wait()
            self._check()
        except BaseException:
            await self._end(at_once=True)
            raise

    def spawn(self, call: Callable[[], Awaitable[None]]) -> None:
        """Run a call of the app in the background, until the stop at the latest. What it raises is logged."""
        done = anyio.Event()

        async def run() -> None:
            try:
                await call()
            finally:
                self._calls.discard(done)
                done.set()

        self._calls.add(done)
        self._supervisor.spawn(run)

    async def stop(self, timeout: float | None) -> None:
        """Raise what the shutdown raises, or `RuntimeError` with its message. Like a server, wait for calls first."""
        with anyio.move_on_after(LEAVE_S):
            for done in tuple(self._calls):
                await done.wait()
        self._stopping.set()
        try:
            with at_most(timeout, lambda: f"the app did not shut down within {timeout:g} s"):
                await self._over.wait()
        finally:
            await self._end(at_once=not self._over.is_set())
        self._check()

    async def _end(self, *, at_once: bool) -> None:
        with anyio.CancelScope(shield=True):
            self._supervisor.request_stop()
            if at_once:
                self._over.set()
            await self._supervisor.wait_ended()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    async def _run(self) -> None:
        scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": self.state}
        try:
            await self._app(scope, self._receive, self._send)
        except BaseException as exc:
            if not is_failure(exc):
                raise
            if self._supported:
                self._error = exc
        finally:
            self._started.set()
            self._over.set()

    async def _receive(self) -> Message:
        if not self._supported:
            self._supported = True
            return {"type": "lifespan.startup"}
        await self._stopping.wait()
        return {"type": "lifespan.shutdown"}

    async def _send(self, message: Message) -> None:
        kind = message["type"]
        assert kind.startswith("lifespan."), (
            f"the app responded to its lifespan with {kind}; pass lifespan=False if it handles only requests"
        )
        if kind.endswith(".failed"):
            what = "start" if kind == "lifespan.startup.failed" else "shut down"
            self._error = RuntimeError(f"the app could not {what}: {message.get('message') or 'no reason given'}")
        self._started.set()
        if kind != "lifespan.startup.complete":
            self._over.set()
