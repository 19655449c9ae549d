"""`Realtime`: the object that users hold.

It has the settings, creates the parts, starts and stops them, and is the ASGI app. Its other calls are in `calls`, by
subject. Calls that only touch memory are sync; calls that can wait for the broker are async. All arguments after the
first two are keyword-only.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal

from asgi_realtime.brokers import Broker, open_broker
from asgi_realtime.brokers.base import InOneProcess, StreamKey
from asgi_realtime.calls import Calls
from asgi_realtime.core.access import Authorize, AuthorizeInspector, check_function
from asgi_realtime.core.config import Cors, Limits, Retention, Timeouts, check_switch, settings_or_default
from asgi_realtime.core.errors import InvalidConfiguration, shown
from asgi_realtime.core.names import stream_name
from asgi_realtime.engine.engine import Engine
from asgi_realtime.engine.thread_bridge import ThreadBridge
from asgi_realtime.runs.handles import TOKEN_EXPIRES_IN_S
from asgi_realtime.runs.recent import RecentRuns
from asgi_realtime.sync import SyncRealtime
from asgi_realtime.tasks import Executor
from asgi_realtime.tasks.options import RunLike, run_id_of
from asgi_realtime.tasks.registry import Tasks
from asgi_realtime.tokens import TokenAuthority, check_owner

if TYPE_CHECKING:
    from asgi_realtime.asgi.app import RealtimeApp
    from asgi_realtime.asgi.host_response import HostResponse
    from asgi_realtime.metrics import CollectorRegistry, Metrics

Asgi = Callable[[Any, Any, Any], Awaitable[None]]


class Realtime(Calls):
    """Live run updates and token streams for one app. An ASGI app and an async context manager.

    Mount it (`app.mount("/realtime", realtime)`) and start it with the app: `lifespan=realtime.lifespan`,
    `async with realtime:`, or `RealtimeMiddleware`. Without any of these it starts on first use.

    `secret_key` signs tokens and needs at least 32 bytes; of several keys, the first signs and all verify. `cors` is
    "*", a list of origins, a `Cors`, or None if the host handles CORS. `authorize(request, resource)` lets a session of
    the host replace a token (docs/tokens.md). `api=False` responds 404 to all of `/api/`.
    `inspector=True` serves a page about all runs at `/inspect`, for the secret key or for what `authorize_inspector`
    allows (docs/inspector.md). `metrics=True` serves metrics for Prometheus; a `CollectorRegistry` adds them to yours.
    `signals=False` installs no signal handlers. `debug=True` shows subscribers the messages of all exceptions. `clock`
    returns unix seconds. Raises `InvalidConfiguration`.
    """

    def __init__(
        self,
        *,
        secret_key: str | Sequence[str] | None = None,
        broker: str | Broker = "memory://",
        executor: Executor | None = None,
        limits: Limits | None = None,
        retention: Retention | None = None,
        timeouts: Timeouts | None = None,
        cors: Cors | str | Sequence[str] | None = "*",
        authorize: Authorize | None = None,
        api: bool = True,
        inspector: bool = False,
        authorize_inspector: AuthorizeInspector | None = None,
        signals: bool = True,
        debug: bool = False,
        metrics: bool | CollectorRegistry = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.limits = settings_or_default(limits, Limits)
        self.retention = settings_or_default(retention, Retention)
        self.timeouts = settings_or_default(timeouts, Timeouts)
        self.cors = cors if isinstance(cors, Cors) or cors is None else Cors(origins=cors)
        self.authorize = check_function(authorize, name="authorize")
        self.authorize_inspector = check_function(authorize_inspector, name="authorize_inspector")
        self.api = check_switch(api, name="api")
        self.debug = check_switch(debug, name="debug")
        if not callable(clock):
            raise InvalidConfiguration(f"clock is {shown(clock)}; allowed is a function that returns unix seconds")
        self.clock = clock
        self.metrics = None if metrics is False else _make_metrics(metrics)
        if isinstance(broker, str):
            broker = open_broker(
                broker, limits=self.limits, retention=self.retention, timeouts=self.timeouts, clock=clock
            )
        elif not hasattr(broker, "append"):
            raise InvalidConfiguration(
                f"broker is {shown(broker)}; allowed are a URL such as 'redis://…' and a Broker object"
            )
        self.broker = broker
        home = partial(getattr, broker, "home") if isinstance(broker, InOneProcess) else str
        tokens = TokenAuthority(secret_key or "", clock=clock, home=home, max_life_s=self.limits.token_life)
        engine = Engine(
            broker,
            limits=self.limits,
            timeouts=self.timeouts,
            clock=clock,
            signals=check_switch(signals, name="signals"),
            debug=debug,
            handle=self._handle,
            retention=self.retention,
            reporter=self.metrics,
        )
        super().__init__(engine, Tasks(engine, executor, retention=self.retention), tokens)
        if self.metrics is not None:
            self.metrics.attach(engine)
        self.inspector = check_switch(inspector, name="inspector") or authorize_inspector is not None
        if self.inspector:
            engine.list_runs()
        self.watchers = engine.watchers
        self._bridge = ThreadBridge(engine)

    if not TYPE_CHECKING:  # a type checker would then accept any assignment

        def __setattr__(self, name: str, value: object) -> None:
            """Raise `AttributeError` for a setting, which the parts have read already."""
            if name in _SETTINGS and "_bridge" in self.__dict__:
                raise AttributeError(f"realtime.{name} cannot be assigned; pass {name}= to Realtime(…)")
            super().__setattr__(name, value)

    def __repr__(self) -> str:
        return f"<Realtime broker={type(self.broker).__name__}>"

    # Start and stop

    async def start(self) -> None:
        """Start, in the context of the caller. Idempotent. Can start again after `stop`, on any event loop."""
        async with self._bridge.host_start():
            await self.engine.ensure_started(lazy=False)

    async def stop(self) -> None:
        """Give runs `timeouts.drain` from the beginning of the shutdown to finish, cancel the rest, end every
        subscription, and close the broker.

        Idempotent.
        """
        await self.engine.stop()

    def begin_shutdown(self) -> None:
        """Begin the shutdown, as SIGTERM does: reject new runs, end subscriptions so that their clients reconnect, and
        give runs `timeouts.drain` to finish. Thread-safe; idempotent."""
        self.engine.shutdown.begin()

    async def __aenter__(self) -> Realtime:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()

    @asynccontextmanager
    async def lifespan(self, app: object = None) -> AsyncIterator[None]:
        """A lifespan for Starlette, FastAPI and Litestar: `FastAPI(lifespan=realtime.lifespan)`."""
        async with self:
            yield

    @property
    def running(self) -> bool:
        """Whether it was started on this event loop and its broker is available."""
        return self.engine.running

    @property
    def closing(self) -> bool:
        """Whether the shutdown has begun. A task without end can check this to finish in time."""
        return self.engine.shutdown.begun

    def drains(self, run_id: str, /) -> bool:
        """Whether the run executes in this process and a shutdown waits for it."""
        return self.engine.shutdown.waits_for(run_id)

    @property
    def recent(self) -> RecentRuns | None:
        """The runs that changed last, if the inspector is on."""
        return self.engine.recent

    @property
    def subscribers(self) -> set[Any]:
        """The streams, feeds and polls that are open in this process; `len(realtime.subscribers)` counts them."""
        return self.engine.subscribers.open

    @cached_property
    def respond(self) -> Callable[[Any, Any], Awaitable[Asgi]]:
        """`RealtimeMiddleware` calls this with scope and receive. Returns the response, as an ASGI app."""
        return self._app.respond

    @cached_property
    def _app(self) -> RealtimeApp:
        from asgi_realtime.asgi.app import RealtimeApp  # the only upward import: `Realtime` is an ASGI app too

        return RealtimeApp(self)

    @property
    def client_js(self) -> str:
        """The name of the browser module under the mount, such as `client-5f478a42c79c.js`. Browsers store it forever,
        because it changes with the module."""
        return self._app.client_js

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        response = await self.respond(scope, receive)
        await response(scope, receive, send)

    def response(
        self,
        run: RunLike,
        stream: str = "default",
        *,
        protocol: Literal["sse", "ai-sdk", "ag-ui"] = "sse",
        request: Any = None,
        last_event_id: str | None = None,
        owner: str | None = None,
    ) -> HostResponse:
        """A stream as the response of your own route, which has authorized the request: it needs no token.

        `protocol` is what the frontend reads: `sse` (docs/protocol.md), `ai-sdk` (`useChat`) or `ag-ui`. The response
        resumes after `last_event_id`, by default the `Last-Event-ID` of `request`. It is a Starlette `Response`. A
        framework of another kind iterates it to get the body, as bytes.

        `owner`, such as `"user:1"`, is charged for the subscription, as in `create_public_token`; by default the host.

        Except with `sse`, its header `x-realtime-resume` has a URL of this stream, with a token that reads it for an
        hour and nothing else, for `resumingFetch` (docs/browser.md).

        It responds 404 if there is no such run, 400 and 410 if it cannot resume there, 429 for a limit and 503 during a
        shutdown; the iterator raises these errors instead. Raises `UsageError`.
        """
        key = StreamKey(run_id_of(run), stream_name(stream, self.limits))
        token = self.tokens.mint(
            [f"read:streams:{key.run}:{key.name}"],
            expires_in_s=TOKEN_EXPIRES_IN_S,
            own_id=True,
            owner=check_owner(owner),
        )
        return self._app.host_response(
            key,
            protocol,
            spawn=self.engine.spawn_brief,
            token=token,
            request=request,
            last_event_id=last_event_id,
            owner=owner or "",
        )

    @cached_property
    def sync(self) -> SyncRealtime:
        """Blocking forms of these calls for code outside of the event loop: a thread, a sync view, a worker process."""
        return SyncRealtime(self, self._bridge)


def _make_metrics(registry: Literal[True] | CollectorRegistry) -> Metrics:
    from asgi_realtime.metrics import make_metrics  # needs an extra

    return make_metrics(registry)


_SETTINGS = frozenset(inspect.signature(Realtime).parameters)
