"""What the HTTP endpoints need of a `Realtime`, as protocols, and the ASGI types.

`Host` is the `Realtime` as an endpoint sees it. `Subscriber` is an open request or subscription as the ticker and the
shutdown of the `Realtime` see it. Everything here runs on the loop of the `Realtime`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any, Protocol

from asgi_realtime.brokers.base import Broker
from asgi_realtime.core.access import Authorize, AuthorizeInspector
from asgi_realtime.core.config import Cors, Limits, Timeouts
from asgi_realtime.engine.subscribers import Subscriber as Subscriber
from asgi_realtime.engine.watchers import Watchers
from asgi_realtime.runs.recent import RecentRuns
from asgi_realtime.runs.store import RunStore
from asgi_realtime.tasks.registry import Tasks
from asgi_realtime.tokens import TokenAuthority

if TYPE_CHECKING:
    from asgi_realtime.metrics import Metrics

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Any, Any, Any], Awaitable[None]]
"""The app of any framework. Each framework has its own types for the three arguments."""
Headers = list[tuple[bytes, bytes]]


class Host(Protocol):
    """The part of a `Realtime` that endpoints use.

    A host has one ticker, which calls `tick` of every subscriber about every `timeouts.tick` seconds. A shutdown sets
    `closing` and then calls `shut_down` of every subscriber, and again when it no longer waits for any run. Both
    iterate over a copy of `subscribers`.
    """

    broker: Broker
    runs: RunStore
    watchers: Watchers
    tokens: TokenAuthority
    tasks: Tasks
    limits: Limits
    timeouts: Timeouts
    cors: Cors | None
    authorize: Authorize | None
    authorize_inspector: AuthorizeInspector | None
    api: bool
    debug: bool
    metrics: Metrics | None

    @property
    def running(self) -> bool:
        """Whether `ensure_started` has nothing to do."""
        ...

    @property
    def closing(self) -> bool: ...
    @property
    def recent(self) -> RecentRuns | None:
        """What the inspector lists; None if it is off."""
        ...

    @property
    def subscribers(self) -> set[Subscriber]: ...
    @property
    def clock(self) -> Callable[[], float]: ...

    def drains(self, run_id: str, /) -> bool:
        """Whether the run executes here and a shutdown waits for it, so that its readers stay until its end."""
        ...

    async def ensure_started(self) -> None:
        """Start unless started. Called first for each request, unless `running`."""
        ...

    async def start(self) -> None:
        """Start in the context of the host's start-up. Idempotent."""
        ...

    async def stop(self) -> None:
        """Shut down: end everything that runs, and leave the broker. Idempotent."""
        ...

    async def cancel(self, run_id: str, /) -> object:
        """Cancel a run. Raises `RunNotFound`."""
        ...


class HostApp(Protocol):
    """A `Realtime` as the middleware sees it: responds to requests, and is started and stopped."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def respond(self, scope: Any, receive: Any) -> Awaitable[App]:
        """The response to a request, as an ASGI app to call once."""
        ...
