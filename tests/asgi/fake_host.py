"""A small fake of `Realtime`, with the real memory broker and tokens. Tests advance its clock and ticker."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from itertools import count
from typing import Any, TypeVar, cast

import anyio.lowlevel

from asgi_realtime.asgi.app import RealtimeApp
from asgi_realtime.asgi.host import Receive, Scope, Send, Subscriber
from asgi_realtime.brokers.base import Broker, ChangeMark
from asgi_realtime.brokers.memory import MemoryBroker
from asgi_realtime.core.access import Authorize, AuthorizeInspector
from asgi_realtime.core.chunks import encode_value
from asgi_realtime.core.config import Cors, Limits, Retention, Timeouts
from asgi_realtime.core.errors import RunNotFound
from asgi_realtime.core.log import StreamKey
from asgi_realtime.core.names import input_stream
from asgi_realtime.core.run_changes import Finished, InputAdded, RunChange, Started, StreamAdded, apply
from asgi_realtime.core.runs import BatchMember, RunError, Status, StoredRecord
from asgi_realtime.engine.watchers import Watchers
from asgi_realtime.loop.retry import Retry
from asgi_realtime.metrics import Metrics
from asgi_realtime.runs.recent import RecentRuns
from asgi_realtime.runs.reporter import Reporter
from asgi_realtime.runs.store import RunStore
from asgi_realtime.tasks.budgets import Budgets
from asgi_realtime.tasks.registry import Tasks
from asgi_realtime.tokens import TokenAuthority

SECRET = "a secret that is long enough for the tests"
NOW = 1_800_000_000.0

R = TypeVar("R")


class NoTasks:
    """No tasks. Nothing is known of a batch except its runs."""

    def __init__(self, budgets: Budgets) -> None:
        self.budgets = budgets

    @property
    def batches(self) -> NoTasks:
        return self

    async def closed(self, batch_id: str) -> bool | None:
        return None


class FakeHost:
    """The part of a `Realtime` that the endpoints use, without tasks. It is the ASGI app, too."""

    def __init__(
        self,
        *,
        limits: Limits | None = None,
        timeouts: Timeouts | None = None,
        retention: Retention | None = None,
        cors: Cors | None = None,
        authorize: Authorize | None = None,
        api: bool = True,
        debug: bool = False,
    ) -> None:
        self.now = NOW
        self.secret = SECRET
        self.limits = limits or Limits()
        self.timeouts = timeouts or Timeouts()
        self.cors = cors
        self.authorize = authorize
        self.authorize_inspector: AuthorizeInspector | None = None
        self.recent: RecentRuns | None = None
        self.api = api
        self.debug = debug
        self.running = False
        self.closing = False
        self.draining: set[str] = set()
        self.subscribers: set[Subscriber] = set()
        self.broker: Broker = MemoryBroker(limits=self.limits, retention=retention, clock=self.clock)
        self.tokens = TokenAuthority(SECRET, clock=self.clock)
        self.runs = cast(RunStore, self)
        self.tasks = cast(Tasks, NoTasks(Budgets(self.runs, self.limits)))
        self.watchers = Watchers(self.runs, clock=self.clock, timeouts=self.timeouts)
        self.retry = Retry(0.0)
        self.reporter = Reporter()
        self.metrics: Metrics | None = None
        self.calls: list[str] = []
        self.start_error: Exception | None = None
        self.stop_error: Exception | None = None
        self._marks = count()
        self.app = RealtimeApp(self)
        self.respond = self.app.respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self.respond(scope, receive)
        await response(scope, receive, send)

    def clock(self) -> float:
        return self.now

    # Called by the endpoints

    def drains(self, run_id: str, /) -> bool:
        return run_id in self.draining

    async def ensure_started(self) -> None:
        if self.start_error is not None:
            raise self.start_error

    async def start(self) -> None:
        self.calls.append("start")
        if self.start_error is not None:
            raise self.start_error

    async def stop(self) -> None:
        self.calls.append("stop")
        self.begin_shutdown()
        if self.stop_error is not None:
            raise self.stop_error

    def begin_shutdown(self) -> None:
        self.closing = True
        for subscriber in tuple(self.subscribers):
            subscriber.shut_down()

    async def load(self, run_ids: Sequence[str], /) -> list[StoredRecord | None]:
        return await self.broker.load(run_ids)

    async def get(self, run_id: str) -> StoredRecord:
        (record,) = await self.broker.load([run_id])
        if record is None:
            raise RunNotFound(f"no run {run_id!r}")
        return record

    async def cancel(self, run_id: str, /) -> StoredRecord:
        return await self.change(run_id, Finished(Status.CANCELED))

    async def add_stream(self, key: StreamKey, /) -> None:
        await self.change(key.run, InputAdded(key.name) if key.hidden else StreamAdded(key.name))

    async def update(self, run_id: str, /, *changes: RunChange, mark: ChangeMark | None = None) -> StoredRecord:
        return await self.change(run_id, *changes)

    # Called by the tests

    async def create(
        self,
        run_id: str = "run_1",
        *,
        task: str = "chat",
        tags: Iterable[str] = (),
        batch: BatchMember | None = None,
        executing: bool = True,
        created_ago_s: float = 0,
        payload: Any = None,
    ) -> StoredRecord:
        now_ms = round((self.now - created_ago_s) * 1000)
        record = StoredRecord(
            id=run_id,
            task=task,
            status=Status.QUEUED,
            created_at_ms=now_ms,
            updated_at_ms=now_ms,
            tags=tuple(tags),
            batch=batch,
            payload_json=None if payload is None else encode_value(payload),
        )
        await self.broker.commit(record, expect=0, change=self._mark())
        return await self.change(run_id, Started("me")) if executing else record

    async def create_batch(self, count: int = 3) -> None:
        """Create `run_0` to `run_<count - 1>` in `batch_1`."""
        for index in range(count):
            await self.create(f"run_{index}", batch=BatchMember("batch_1", index, count))

    async def change(self, run_id: str, *changes: RunChange) -> StoredRecord:
        return await (await self.prepare_change(run_id, *changes))()

    async def prepare_change(self, run_id: str, *changes: RunChange) -> Callable[[], Awaitable[StoredRecord]]:
        """Load the run. The returned function commits the changes and does not load."""
        record = await self.get(run_id)
        following = apply(record, changes, round(self.now * 1000))

        async def commit() -> StoredRecord:
            if following is not record:
                await self.broker.commit(following, expect=record.version, change=self._mark())
            return following

        return commit

    async def finish(
        self, run_id: str = "run_1", status: Status = Status.COMPLETED, *, output: Any = None, error: str | None = None
    ) -> StoredRecord:
        failure = None if error is None else RunError("TaskError", error)
        return await self.change(run_id, Finished(status, encode_value(output), failure))

    async def append(self, *chunks: Any, run_id: str = "run_1", key: str = "default") -> None:
        await self.change(run_id, StreamAdded(key))
        await self.broker.append(StreamKey(run_id, key), [encode_value(chunk) for chunk in chunks])

    async def send_input(self, run_id: str, input_id: str, data: Any, /) -> None:
        await self.broker.append(StreamKey(run_id, input_stream(input_id, self.limits)), [encode_value(data)])

    def _mark(self) -> ChangeMark:
        return ChangeMark("tests", next(self._marks))

    def token(self, *scopes: str, expires_in_s: float = 900, skip_columns: Sequence[str] = ()) -> str:
        extra = {"realtime": {"skipColumns": list(skip_columns)}} if skip_columns else None
        return self.tokens.mint(scopes or ("read:runs:run_1",), expires_in_s=expires_in_s, extra=extra)

    def headers(self, *scopes: str, **more: str) -> dict[str, str]:
        given = {name.replace("_", "-"): value for name, value in more.items()}
        return {"authorization": f"Bearer {self.token(*scopes)}", **given}

    def feed_headers(self, *scopes: str, **more: str) -> dict[str, str]:
        return {"accept": "text/event-stream", **self.headers(*scopes, **more)}

    def tick(self, seconds: float = 0.5) -> None:
        """Advance the clock and call the ticker."""
        self.now += seconds
        for subscriber in tuple(self.subscribers):
            subscriber.tick(self.now, self.now)

    async def wait_for_subscriber(self, kind: type[R] = object) -> R:  # type: ignore[assignment]
        """Wait until there is a subscriber of this kind, such as an open request."""
        while True:
            for subscriber in self.subscribers:
                if isinstance(subscriber, kind):
                    return subscriber
            await anyio.lowlevel.checkpoint()
