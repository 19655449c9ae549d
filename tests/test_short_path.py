"""The short path of a chunk gives the same results as the general one, over random histories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import anyio
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from asgi_realtime.asgi.connection import WHOLE_BYTES
from asgi_realtime.asgi.streams import StreamResponse
from asgi_realtime.brokers.base import AppenderBroker, ChangeMark, Producer, StreamKey
from asgi_realtime.brokers.memory import MemoryBroker
from asgi_realtime.core.config import Limits, Retention, Timeouts
from asgi_realtime.core.errors import RealtimeError
from asgi_realtime.core.log import End
from asgi_realtime.core.runs import Status, StoredRecord
from asgi_realtime.runs.store import RunStore
from asgi_realtime.streams.outbox import Outbox
from asgi_realtime.streams.writer import StreamWriter
from asgi_realtime.testing.conformance.kit import next_version
from asgi_realtime.testing.driver import make_scope
from tests.asgi.fake_host import FakeHost
from tests.inprocess import GUARD_S

LIMITS = Limits()
RETENTION = Retention(total_bytes=20_000, stream_bytes=5_000, after_end=10)
RUNS = ("hosts", "owned")


class GeneralBroker(MemoryBroker):
    """Offers no short path."""

    appender = None  # type: ignore[assignment]


class Side:
    """One broker, its writers, and everything that can be seen of it."""

    def __init__(self, kind: type[MemoryBroker]) -> None:
        self.now = 1000.0
        self.broker = kind(limits=LIMITS, retention=RETENTION, clock=lambda: self.now)
        self.store = RunStore(self.broker, clock=lambda: self.now, patience_s=0, limits=LIMITS, retention=RETENTION)
        self.writers: dict[StreamKey, StreamWriter] = {}
        self.marks = 0

    async def create(self, run_id: str) -> None:
        owner = "user" if run_id == "owned" else None
        made = StoredRecord(
            id=run_id, task="t", status=Status.QUEUED, created_at_ms=0, updated_at_ms=0, token_owner=owner
        )
        await self.broker.commit(made, expect=0, change=self.mark(run_id))

    async def end(self, run_id: str) -> None:
        (record,) = await self.broker.load([run_id])
        assert record is not None
        ended = next_version(record, status=Status.COMPLETED, completed_at_ms=int(self.now * 1000))
        await self.broker.commit(ended, expect=record.version, change=self.mark(run_id))

    def mark(self, run_id: str) -> ChangeMark:
        self.marks += 1
        return ChangeMark(run_id, self.marks)

    async def write(self, key: StreamKey, size: int) -> int | None:
        writer = self.writers.get(key)
        if writer is None:
            writer = self.writers[key] = StreamWriter(key, runs=self.store, find_outbox=self.no_outbox)
        writer.write(b'"%s"' % (b"x" * size))
        return writer.last_index

    def no_outbox(self, key: StreamKey) -> Outbox:
        raise AssertionError("a broker in memory needs none")

    async def step(self, name: str, key: StreamKey, size: int) -> object:
        """Take one step. Returns its result or its error."""
        try:
            match name:
                case "write":
                    return await self.write(key, size)
                case "append":
                    return await self.broker.append(key, [b"1", b"%d" % size], producer=Producer(f"p{size % 3}", 0))
                case "close":
                    return await self.broker.append(key, [], end=End("complete"))
                case "create":
                    await self.create(key.run)
                case "end":
                    await self.end(key.run)
                case "remove":
                    await self.broker.remove(key.run)
                case "wait":
                    self.now += size
        except (RealtimeError, AssertionError) as exc:
            return type(exc), str(exc)
        return None

    async def seen(self) -> object:
        pages: list[object] = []
        for run_id in RUNS:
            for name in "ab":
                try:
                    pages.append(await self.broker.read(StreamKey(run_id, name), limit=1000))
                except RealtimeError as exc:
                    pages.append(str(exc))
        writers = [(key, one.chunks, one.bytes, one.last_index) for key, one in self.writers.items()]
        return self.broker.size, self.broker._space.owners_size, pages, writers


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["write"] * 12 + ["append", "close", "create", "create", "end", "remove", "wait"]),
        st.builds(StreamKey, st.sampled_from(RUNS), st.sampled_from("ab")),
        st.one_of(st.integers(0, 60), st.integers(0, 3000)),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@example(history=[("write", StreamKey(run_id, name), 2000) for _ in range(3) for run_id in RUNS for name in "ab"])
@given(history=STEPS)
@pytest.mark.anyio
async def test_a_chunk_is_stored_alike(history: list[tuple[str, StreamKey, int]]) -> None:
    short, general = Side(MemoryBroker), Side(GeneralBroker)
    assert isinstance(short.broker, AppenderBroker)
    assert not isinstance(general.broker, AppenderBroker)
    for side in (short, general):
        for run_id in RUNS:
            await side.create(run_id)
    for name, key, size in history:
        assert await short.step(name, key, size) == await general.step(name, key, size), name
        assert await short.seen() == await general.seen(), name


# From the log to `send`


class Reader:
    """A client that reads as fast as `stalls` says: how many loop iterations each message takes."""

    def __init__(self, host: FakeHost, stalls: list[int]) -> None:
        self.host = host
        self.stalls = list(stalls)
        self.body = b""
        self.is_sending = False
        self.largest = 0
        self.tasks: set[int] = set()

    async def run(self) -> None:
        scope = make_scope("GET", "/v1/streams/run_1/default", headers=self.host.headers())
        await self.host(scope, self._receive, self._send)

    async def _receive(self) -> Any:
        await anyio.sleep_forever()

    async def _send(self, message: Any) -> None:
        assert not self.is_sending
        self.is_sending = True
        self.tasks.add(anyio.get_current_task().id)
        for _ in range(self.stalls.pop(0) if self.stalls else 0):
            await anyio.lowlevel.checkpoint()
        body = message.get("body", b"")
        self.body += body
        self.largest = max(self.largest, len(body))
        self.is_sending = False


READS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.lists(st.integers(0, 40), min_size=1, max_size=4)),
        st.tuples(st.just("large"), st.lists(st.integers(30_000, 90_000), min_size=1, max_size=3)),
        st.tuples(st.just("turns"), st.integers(1, 6)),
        st.tuples(st.just("tick"), st.integers(0, 20)),
    ),
    max_size=25,
)


async def read(
    take_turn: Callable[[StreamResponse], bool | None], history: list[Any], stalls: list[int], *, settles: bool
) -> Reader:
    host = FakeHost(timeouts=Timeouts(heartbeat=5, send=3600))
    await host.create()
    reader = Reader(host, stalls)
    with patch.object(StreamResponse, "take_turn", take_turn), anyio.fail_after(GUARD_S):
        async with anyio.create_task_group() as group:
            group.start_soon(reader.run)
            for step, argument in history:
                match step:
                    case "append" | "large":
                        await host.append(*["x" * size for size in argument])
                    case "turns":
                        for _ in range(argument):
                            await anyio.lowlevel.checkpoint()
                    case "tick":
                        host.tick(argument)
            if settles:
                for _ in range(sum(stalls) + 50 * (len(history) + 1)):  # more than it takes to send everything
                    await anyio.lowlevel.checkpoint()
            before_end = len(reader.body)
            await host.finish()
    if settles:
        assert reader.body[before_end:].startswith(b"event: end"), "everything was sent without waiting for the end"
    assert reader.largest <= WHOLE_BYTES
    return reader


@settings(max_examples=150, deadline=None)
@example(history=[("turns", 6), ("append", [1]), ("turns", 2), ("large", [80_000])], stalls=[], settles=True)
@example(history=[("turns", 6), *[("append", [1]), ("turns", 2)] * 4], stalls=[0, 0, 6, 6, 6], settles=True)
@given(history=READS, stalls=st.lists(st.integers(0, 6), max_size=20), settles=st.booleans())
@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_chunk_is_sent_alike(history: list[Any], stalls: list[int], settles: bool) -> None:
    short = await read(StreamResponse.take_turn, history, stalls, settles=settles)
    general = await read(StreamResponse.wake, history, stalls, settles=settles)
    heartbeat = b": heartbeat\n"  # when there is silence depends on the pace
    assert short.body.replace(heartbeat, b"") == general.body.replace(heartbeat, b"")
    assert len(short.tasks) == len(general.tasks) == 1, "every message is sent by the task of the request"


@pytest.mark.anyio
async def test_a_send_that_raises_at_once_stops_no_other_reader() -> None:
    host = FakeHost()
    await host.create()
    failing, reader = Reader(host, []), Reader(host, [])
    send = failing._send

    def raise_at_once(message: Any) -> Any:
        if b"data" in message.get("body", b""):
            raise ConnectionError("the client has disconnected")
        return send(message)

    failing._send = raise_at_once  # type: ignore[method-assign]
    async with anyio.create_task_group() as group:
        group.start_soon(failing.run)
        group.start_soon(reader.run)
        await anyio.wait_all_tasks_blocked()
        await host.append("a")
        await anyio.wait_all_tasks_blocked()
        assert b'data: "a"' in reader.body
        assert len(host.subscribers) == 1
        await host.finish()
    assert b"data" not in failing.body
