"""What the HTTP surface needs of a `Realtime`, and what a `Realtime` needs of a subscription.

The one direction is `Host`, the other `Subscriber`. Everything here runs on the loop of the `Realtime`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any, Protocol

from asgi_realtime.brokers.base import Broker, ChangeMark, StreamKey
from asgi_realtime.core.config import Cors, Limits, Timeouts
from asgi_realtime.core.runs import RunChange, RunRecord
from asgi_realtime.engine.subscribers import Subscriber as Subscriber
from asgi_realtime.loop.retry import Retry
from asgi_realtime.tasks.registry import Tasks
from asgi_realtime.tokens import TokenAuthority

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Any, Any, Any], Awaitable[None]]
"""Any host's app: each framework has types of its own for these three."""
Headers = list[tuple[bytes, bytes]]


class Runs(Protocol):
    """Read access to run records."""

    async def get(self, run_id: str) -> RunRecord:
        """The newest record. Raises `RunNotFound`."""
        ...

    async def load(self, run_ids: Sequence[str], /) -> list[RunRecord | None]:
        """The newest records, in the order asked; None for those that do not exist."""
        ...


class WritableRuns(Runs, Protocol):
    """Run records, and what changing them and writing into streams of theirs needs besides the broker."""

    async def update(self, run_id: str, /, *changes: RunChange, mark: ChangeMark | None = None) -> RunRecord:
        """Apply changes to the newest record and store it, once for a mark. Raises `RunNotFound`, `LimitExceeded`."""
        ...

    async def add_stream(self, key: StreamKey, /) -> None:
        """Make sure that the run lists the stream or input. Raises `RunNotFound`, `LimitExceeded`."""
        ...

    @property
    def retry(self) -> Retry:
        """Repeats a call while the broker is unavailable, for up to `timeouts.append`."""
        ...


class Host(Protocol):
    """The part of a `Realtime` that answers are made of.

    The one ticker of a host calls `tick` of every subscriber about each `timeouts.tick` seconds; `begin_shutdown` sets
    `closing` and then calls `shut_down` of every subscriber. Both go through a copy of `subscribers`.
    """

    @property
    def broker(self) -> Broker: ...
    @property
    def runs(self) -> WritableRuns: ...
    @property
    def tokens(self) -> TokenAuthority: ...
    @property
    def tasks(self) -> Tasks: ...
    @property
    def limits(self) -> Limits: ...
    @property
    def timeouts(self) -> Timeouts: ...
    @property
    def cors(self) -> Cors | None: ...
    @property
    def api(self) -> bool: ...
    @property
    def debug(self) -> bool: ...
    @property
    def closing(self) -> bool: ...
    @property
    def subscribers(self) -> set[Subscriber]: ...
    @property
    def clock(self) -> Callable[[], float]: ...

    async def ensure_started(self) -> None:
        """Start unless started. Called before anything else of a request."""
        ...

    async def start(self) -> None:
        """Start in the context of the host's start-up. Idempotent."""
        ...

    async def stop(self) -> None:
        """Begin the shutdown, end everything that runs, and leave the broker. Idempotent."""
        ...

    async def cancel(self, run_id: str, /) -> object:
        """Cancel a run. Raises `RunNotFound`."""
        ...


class HostApp(Protocol):
    """A `Realtime` as the middleware sees it: an ASGI app with a life of its own."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None: ...
