"""Streams as the official clients read them: in batches, and with a clean end only if the stream is complete."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from asgi_realtime.brokers.base import StreamKey
from asgi_realtime.brokers.live_log import LiveLog
from asgi_realtime.core.chunks import encode_value
from asgi_realtime.core.config import Limits, Retention
from asgi_realtime.core.errors import BrokerUnavailable
from asgi_realtime.core.log import End, Entry, Page
from asgi_realtime.core.runs import Status
from asgi_realtime.testing import AsgiClient, Event, StreamedResponse
from tests.asgi.fake_host import NOW, FakeHost
from tests.asgi.official_sdk import on_one_loop
from tests.inprocess import GUARD_S

pytestmark = pytest.mark.anyio

PATH = "/v1/streams/run_1/default"


@asynccontextmanager
async def reading(host: FakeHost, path: str = PATH, **more: str) -> AsyncIterator[StreamedResponse]:
    headers = host.headers(trigger_version="4.8.3", accept="text/event-stream", **more)
    with anyio.fail_after(GUARD_S):
        async with AsgiClient(host).stream(path, headers=headers) as response:
            yield response


def records(events: list[Event]) -> list[dict[str, Any]]:
    return [record for event in events if event.event == "batch" for record in json.loads(event.data)["records"]]


def chunks(events: list[Event]) -> list[Any]:
    return [json.loads(record["body"])["data"] for record in records(events)]


async def read_all(host: FakeHost, **more: str) -> list[Event]:
    async with reading(host, **more) as response:
        assert response.status_code == 200
        return await response.read_all_events()


# The framing


async def test_chunks_on_the_wire(host: FakeHost) -> None:
    await host.create()
    await host.append("Hel", {"token": "lo"})
    await host.finish()
    async with reading(host) as response:
        assert response.status_code == 200
        assert response.headers["x-stream-version"] == "v2"
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert "x-stream-version" in response.headers["access-control-expose-headers"]
        body = await response.read()
    batch, rest = body.removeprefix(b": connected\n").split(b"\n\n")
    assert rest == b""
    assert batch == (
        b'event: batch\ndata: {"records":['
        b'{"seq_num":0,"timestamp":%d,"body":"{\\"data\\":\\"Hel\\",\\"id\\":\\"0\\"}","headers":[]},'
        b'{"seq_num":1,"timestamp":%d,"body":"{\\"data\\":{\\"token\\":\\"lo\\"},\\"id\\":\\"1\\"}","headers":[]}]}'
    ) % (NOW * 1000, NOW * 1000)


async def test_a_client_without_the_version_header_gets_native_events(host: FakeHost) -> None:
    await host.create()
    await host.append("x")
    await host.finish()
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        assert "x-stream-version" not in response.headers
        assert [event.event for event in await response.read_all_events()] == ["message", "end"]


@on_one_loop
@pytest.mark.parametrize("chunk", ["", 'q"q\\', "\u2028\u2029", "é😀", None, 1e300, [{}], {"data": 1, "id": "x"}, True])
async def test_chunks_of_every_type_are_wrapped(host: FakeHost, chunk: Any) -> None:
    await host.create()
    await host.append(chunk)
    await host.finish()
    assert chunks(await read_all(host)) == [chunk]


async def test_chunks_arrive_when_they_are_written(host: FakeHost) -> None:
    await host.create()
    async with reading(host) as response:
        for number in range(3):
            await host.append(number)
            assert chunks(await response.read_events()) == [number]
            host.tick(1)
        await host.finish()
        assert await response.read_all_events() == []
        assert response.ended
    seen = records(response.events)
    assert [record["seq_num"] for record in seen] == [0, 1, 2]
    assert [record["timestamp"] for record in seen] == [round((NOW + second) * 1000) for second in range(3)]


# Cursors


@on_one_loop
@pytest.mark.parametrize(("last", "expected"), [("0", [1, 2]), ("1", [2]), ("2", [])])
async def test_a_resume_continues_after_the_last_chunk(host: FakeHost, last: str, expected: list[int]) -> None:
    await host.create()
    await host.append(0, 1, 2)
    await host.finish()
    assert chunks(await read_all(host, last_event_id=last)) == expected


@on_one_loop
@pytest.mark.parametrize("last", ["3", "99"])
async def test_a_resume_beyond_the_end_is_409(host: FakeHost, last: str) -> None:
    """An empty body would be a clean end, and the client has chunks that are not stored."""
    await host.create()
    await host.append(0, 1, 2)
    await host.finish()
    async with reading(host, last_event_id=last) as response:
        assert response.status_code == 409  # final for the clients
        assert json.loads(await response.read()) == {
            "error": "the position is past the end of the stream, which has 3 chunks",
            "code": "stream_lost",
        }


async def test_a_stream_that_ends_before_the_position_is_no_clean_end(host: FakeHost) -> None:
    await host.create()
    await host.append(0)
    async with reading(host, last_event_id="7") as response:
        await response.chunk()
        await host.finish()
        (event,) = await response.read_all_events()
    assert event.event == "error"


async def test_latest_starts_at_the_end(host: FakeHost) -> None:
    await host.create()
    await host.append(0, 1)
    async with reading(host, x_trigger_stream_start="latest") as response:
        await response.chunk()
        await host.append(2)
        assert chunks(await response.read_events()) == [2]
        await host.finish()
        assert await response.read_all_events() == []


async def test_a_cursor_takes_precedence_over_latest(host: FakeHost) -> None:
    await host.create()
    await host.append(0, 1)
    await host.finish()
    assert chunks(await read_all(host, x_trigger_stream_start="latest", last_event_id="0")) == [1]
    assert chunks(await read_all(host, x_trigger_stream_start="latest")) == []


async def test_a_cursor_before_the_first_entry_is_410(host: FakeHost) -> None:
    host = FakeHost(retention=Retention(stream_bytes=60))
    await host.create()
    for number in range(20):
        await host.append(number)
    async with reading(host, last_event_id="2") as response:
        assert response.status_code == 410
        error = json.loads(await response.read())
    assert error["code"] == "stream_gap" and "chunk 3 has expired" in error["error"]


async def test_without_a_cursor_the_first_retained_entry_comes_first(host: FakeHost) -> None:
    host = FakeHost(retention=Retention(stream_bytes=60))
    await host.create()
    for number in range(20):
        await host.append(number)
    await host.finish()
    events = await read_all(host)
    first = records(events)[0]["seq_num"]
    assert first > 0
    assert chunks(events) == list(range(first, 20))


async def test_a_gap_while_reading_makes_the_client_reconnect_for_its_410(host: FakeHost) -> None:
    host = FakeHost(retention=Retention(stream_bytes=60))
    await host.create()
    await host.append("first")
    async with reading(host) as response:
        events = await response.read_events()
        for number in range(20):  # without suspending, so the reader does not run
            await host.broker.append(StreamKey("run_1", "default"), [encode_value(number)])
        events += await response.read_all_events()
        assert response.ended
    assert [event.event for event in events][-1] == "error"
    last = records(events)[-1]["seq_num"]
    async with reading(host, last_event_id=str(last)) as response:
        assert response.status_code == 410


@on_one_loop
@pytest.mark.parametrize("last", ["x", "-1", "1.5", "1" * 19])
async def test_a_malformed_cursor_is_400(host: FakeHost, last: str) -> None:
    await host.create()
    async with reading(host, last_event_id=last) as response:
        assert response.status_code == 400


# Ends


@on_one_loop
@pytest.mark.parametrize("status", [Status.COMPLETED, Status.FAILED, Status.CANCELED, Status.CRASHED, Status.TIMED_OUT])
async def test_the_end_of_a_run_is_a_clean_end(host: FakeHost, status: Status) -> None:
    await host.create()
    await host.append("x")
    await host.finish(status=status, error=None if status is Status.COMPLETED else "no luck")
    assert [event.event for event in await read_all(host)] == ["batch"]


async def test_a_lost_stream_is_never_a_clean_end(host: FakeHost) -> None:
    await host.create()
    await host.append("x")
    await host.broker.append(StreamKey("run_1", "default"), [], end=End("lost", "entries were lost"))
    assert [event.event for event in await read_all(host)] == ["batch", "error"]
    for last in ("0", "5"):
        async with reading(host, last_event_id=last) as response:
            assert response.status_code == 409  # final for the clients
            assert json.loads(await response.read())["code"] == "stream_lost"


async def test_a_shutdown_makes_the_client_reconnect(host: FakeHost) -> None:
    await host.create()
    await host.append("x")
    async with reading(host) as response:
        assert chunks(await response.read_events()) == ["x"]
        host.begin_shutdown()
        (event,) = await response.read_all_events()
        assert event.event == "error"
        assert response.ended


async def test_a_complete_stream_ends_cleanly_at_a_shutdown(host: FakeHost) -> None:
    await host.create()
    await host.append("x")
    await host.finish()
    host.begin_shutdown()
    assert [event.event for event in await read_all(host)] == ["error"]
    assert await read_all(host, last_event_id="0") == []


async def test_an_expired_token_makes_the_client_reconnect_for_its_401(host: FakeHost) -> None:
    await host.create()
    async with reading(host) as response:
        await response.chunk()
        host.tick(901)
        (event,) = await response.read_all_events()
    assert event.event == "error"


async def test_an_unavailable_stream_is_not_a_clean_end(host: FakeHost) -> None:
    await host.create()
    async with reading(host) as response:
        await response.chunk()
        async with host.broker.live(StreamKey("run_1", "default")) as live:
            live.fail(BrokerUnavailable("away"))
            (event,) = await response.read_all_events()
    assert event.event == "error"


async def test_an_unavailable_broker_and_a_shutdown_before_the_head_are_503(host: FakeHost) -> None:
    host.begin_shutdown()
    async with reading(host) as response:
        assert response.status_code == 503
    host = FakeHost()
    host.start_error = BrokerUnavailable("away")
    async with reading(host) as response:
        assert response.status_code == 503


# Silence


async def test_the_body_ends_after_the_requested_silence(host: FakeHost) -> None:
    await host.create()
    async with reading(host, timeout_seconds="20") as response:
        await response.chunk()
        host.tick(12)
        await host.append("x")
        assert chunks(await response.read_events()) == ["x"]
        host.tick(1)
        host.tick(18)
        assert await response.chunk() == b": heartbeat\n"  # does not break the silence
        await anyio.wait_all_tasks_blocked()
        assert not response.ended
        host.tick(2)
        assert await response.read_all_events() == []
        assert response.ended


@pytest.mark.parametrize("broker_has", ["more", "no answer", "nothing"])
async def test_silence_ends_the_body_only_if_the_broker_has_no_more(host: FakeHost, broker_has: str) -> None:
    await host.create()
    await host.append("x")
    async with reading(host, timeout_seconds="20") as response:
        await response.read_events()
        await anyio.wait_all_tasks_blocked()

        async def read(key: StreamKey, *, after: int = -1, limit: int = 500) -> Page:
            if broker_has == "no answer":
                raise BrokerUnavailable("away")
            entries = [Entry(1, b'"late"', 0)] if broker_has == "more" else []
            return Page(entries, 0, 1 + len(entries), None)

        host.broker.read = read  # type: ignore[method-assign]
        host.tick(0)
        host.tick(10)
        host.tick(10)
        if broker_has == "more":
            assert await response.chunk() == b": heartbeat\n"
            await host.append("late")
            assert chunks(await response.read_events()) == ["late"]
        else:
            kinds = [event.event for event in await response.read_all_events()]
            assert kinds == ([] if broker_has == "nothing" else ["error"])
            assert response.ended


async def test_a_clock_change_does_not_end_a_stream(host: FakeHost) -> None:
    await host.create()
    async with reading(host, timeout_seconds="20") as response:
        await response.chunk()
        await anyio.wait_all_tasks_blocked()
        for steady in (0.0, 0.5, 1.0):
            for subscriber in tuple(host.subscribers):
                subscriber.tick(host.now + 100 * steady, steady)
        await anyio.wait_all_tasks_blocked()
        assert not response.ended


async def test_a_cursor_ahead_of_the_stream_ends_after_the_silence(host: FakeHost) -> None:
    await host.create()
    await host.append("x")
    async with reading(host, timeout_seconds="20", last_event_id="99") as response:
        await response.chunk()
        await anyio.wait_all_tasks_blocked()
        host.tick(1)
        host.tick(20)
        assert await response.read_all_events() == []
        assert response.ended


async def test_without_a_timeout_the_body_stays_open(host: FakeHost) -> None:
    await host.create()
    async with reading(host) as response:
        await response.chunk()
        for _ in range(7):
            await anyio.wait_all_tasks_blocked()
            host.tick(60)
            host.tick(60)
            assert await response.chunk() == b": heartbeat\n"


@on_one_loop
@pytest.mark.parametrize("seconds", ["0", "601", "-1", "x", "1.5", "", "9" * 30])
async def test_a_malformed_timeout_is_400(host: FakeHost, seconds: str) -> None:
    await host.create()
    async with reading(host, timeout_seconds=seconds) as response:
        assert response.status_code == 400
        assert "1 to 600" in json.loads(await response.read())["error"]


@on_one_loop
@pytest.mark.parametrize("seconds", ["1", "600"])
async def test_the_shortest_and_longest_timeout_are_accepted(host: FakeHost, seconds: str) -> None:
    await host.create()
    async with reading(host, timeout_seconds=seconds) as response:
        assert response.status_code == 200


# Inputs


async def test_inputs_are_read_in_batches(host: FakeHost) -> None:
    await host.create()
    await host.send_input("run_1", "approval", {"yes": True})
    await host.finish()
    async with reading(host, "/v1/streams/run_1/input/approval") as response:
        assert chunks(await response.read_all_events()) == [{"yes": True}]


async def test_entries_missing_in_this_process_are_read_from_the_broker() -> None:
    host = FakeHost(limits=Limits())
    await host.create()
    await host.append(*range(1200))
    await host.finish()
    live_class = LiveLog
    async with host.broker.live(StreamKey("run_1", "default")) as live:
        assert isinstance(live, live_class)
        first, live.log.first = live.log.first, 1100  # as in a mirror that starts later
        broker_read = host.broker.read

        async def read(key: StreamKey, *, after: int = -1, limit: int = 500) -> Any:
            live.log.first = first
            try:
                return await broker_read(key, after=after, limit=limit)
            finally:
                live.log.first = 1100

        host.broker.read = read  # type: ignore[method-assign]
        assert chunks(await read_all(host)) == list(range(1200))
