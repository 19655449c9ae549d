from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from asgi_realtime.asgi.framing import Framing
from asgi_realtime.brokers.base import StreamKey
from asgi_realtime.brokers.live_log import LiveLog
from asgi_realtime.core.config import Cors, Retention
from asgi_realtime.core.errors import BrokerUnavailable
from asgi_realtime.core.log import End, Log, Page
from asgi_realtime.core.run_changes import StreamAdded
from asgi_realtime.core.runs import BatchMember, Status
from asgi_realtime.testing import AsgiClient, Event, EventParser
from tests.asgi.fake_host import SECRET, FakeHost
from tests.asgi.official_sdk import on_one_loop
from tests.asgi.reading import chunks, kinds
from tests.inprocess import GUARD_S

pytestmark = pytest.mark.anyio

PATH = "/v1/streams/run_1/default"


async def read(host: FakeHost, last_event_id: str | None = None, path: str = PATH) -> list[Event]:
    """All events of a stream that has ended."""
    more = {} if last_event_id is None else {"last-event-id": last_event_id}
    async with AsgiClient(host).stream(path, headers={**host.headers(), **more}) as response:
        assert response.status_code == 200
        return await response.read_all_events()


# Head and preamble


async def test_the_head_and_the_preamble_are_sent_at_once(host: FakeHost) -> None:
    await host.create()
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["cache-control"] == "private, no-store, no-transform"
        assert response.headers["x-accel-buffering"] == "no"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["access-control-allow-origin"] == "*"
        assert "content-length" not in response.headers
        first = await response.chunk()
    assert first.startswith(b"retry: 1000\n: ")
    assert first.endswith(b"\n") and b"\n\n" not in first


async def test_the_comment_lists_the_streams_of_the_run_if_this_one_is_unwritten(host: FakeHost) -> None:
    await host.create()
    await host.append("x", key="other")
    await host.append("x", key='tricky"\n')
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        first = await response.chunk()
    assert b'stream "default" is not written yet; this run has ["other","tricky\\"\\n"]' in first


@pytest.mark.parametrize(("size", "joined"), [(4096, True), (4097, False)])
async def test_a_small_body_comes_with_the_preamble(host: FakeHost, size: int, joined: bool) -> None:
    """Each message is a system call of the server. A large body is not copied, because readers share it."""
    await host.create()
    frame = len(b'id: 0\ndata: ""\n\n')
    await host.append("x" * (size - frame))
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        assert (b"data:" in await response.chunk()) is joined


async def test_the_comment_of_a_written_stream_is_short(host: FakeHost) -> None:
    await host.create()
    await host.append("x")
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        assert await response.chunk() == b'retry: 1000\n: connected\nid: 0\ndata: "x"\n\n'


# Chunks, end and resume


async def test_chunks_and_the_end_on_the_wire(host: FakeHost) -> None:
    await host.create()
    await host.append("a", {"b": 1})
    await host.finish()
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        body = await response.read()
        assert response.ended
    assert body == (
        b"retry: 1000\n: connected\n"
        b'id: 0\ndata: "a"\n\nid: 1\ndata: {"b":1}\n\n'
        b'event: end\nid: 2\ndata: {"reason":"complete"}\n\n'
    )


async def test_chunks_are_sent_as_they_are_written(host: FakeHost) -> None:
    await host.create()
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        await response.chunk()
        await host.append("a")
        assert await response.chunk() == b'id: 0\ndata: "a"\n\n'
        await host.append("b", "c")
        assert await response.chunk() == b'id: 1\ndata: "b"\n\nid: 2\ndata: "c"\n\n'
        await host.finish()
        assert await response.chunk() == b'event: end\nid: 3\ndata: {"reason":"complete"}\n\n'
        with pytest.raises(anyio.EndOfStream):
            await response.chunk()


async def test_the_end_of_a_failed_run_has_its_error(host: FakeHost) -> None:
    await host.create()
    await host.append("a")
    await host.finish(status=Status.FAILED, error="no more tokens")
    (*_, end) = await read(host)
    assert (end.event, json.loads(end.data)) == ("end", {"reason": "failed", "error": "no more tokens"})


@on_one_loop
@pytest.mark.parametrize("last_event_id", range(5))
async def test_a_resumed_stream_sends_the_rest(host: FakeHost, last_event_id: int) -> None:
    await host.create()
    await host.append(*range(5))
    await host.finish()
    events = await read(host, str(last_event_id))
    assert chunks(events) == list(range(last_event_id + 1, 5))
    assert events[-1].event == "end"


@on_one_loop
@pytest.mark.parametrize("reason", ["complete", "lost"])
async def test_resuming_after_the_end_is_204(host: FakeHost, reason: str) -> None:
    await host.create()
    await host.append(*range(5))
    await host.broker.append(StreamKey("run_1", "default"), [], end=End(reason))
    response = await AsgiClient(host).get(PATH, headers=host.headers(last_event_id="5"))
    assert (response.status_code, response.body) == (204, b"")
    assert response.headers["access-control-allow-origin"] == "*"


@on_one_loop
@pytest.mark.parametrize(
    ("end", "error"),
    [
        (End("complete"), "the position is past the end of the stream, which has 3 chunks"),
        (End("failed", "no luck"), "the position is past the end of the stream, which has 3 chunks"),
        (End("lost", "entries were lost"), "entries were lost"),
    ],
)
@pytest.mark.parametrize("last_event_id", ["4", "999999999999"])
async def test_a_client_ahead_of_an_ended_stream_learns_that_something_was_lost(
    host: FakeHost, end: End, error: str, last_event_id: str
) -> None:
    """A 204 would mean that the client has everything, and it has chunks that are not stored."""
    await host.create()
    await host.append(*range(3))
    await host.broker.append(StreamKey("run_1", "default"), [], end=end)
    (event,) = await read(host, last_event_id)
    assert (event.event, event.id) == ("end", "3")
    assert json.loads(event.data) == {"reason": "lost", "error": error}


async def test_an_empty_stream_ends_and_stops_an_event_source_that_reconnects(host: FakeHost) -> None:
    await host.create()
    await host.finish()
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        (end,) = await response.read_all_events()
    assert (end.event, end.id) == ("end", "0")
    again = await AsgiClient(host).get(PATH, headers=host.headers(last_event_id="0"))
    assert again.status_code == 204


async def test_a_position_beyond_an_open_stream_waits(host: FakeHost) -> None:
    await host.create()
    await host.append(0)
    async with AsgiClient(host).stream(PATH, headers=host.headers(last_event_id="2")) as response:
        await response.chunk()
        await host.append(1, 2)
        await host.append(3)
        assert chunks(await response.read_events()) == [3]


@on_one_loop
@pytest.mark.parametrize("last_event_id", ["1", "7"])
async def test_a_stream_that_ends_before_the_position_is_lost(host: FakeHost, last_event_id: str) -> None:
    await host.create()
    await host.append(0)
    async with AsgiClient(host).stream(PATH, headers=host.headers(last_event_id=last_event_id)) as response:
        await response.chunk()
        await host.finish()
        (end,) = await response.read_all_events()
    assert (end.event, end.id, json.loads(end.data)["reason"]) == ("end", "1", "lost")


async def test_the_query_resumes_too_and_the_header_takes_precedence(host: FakeHost) -> None:
    await host.create()
    await host.append(*range(5))
    await host.finish()
    query = {"last_event_id": "3"}
    async with AsgiClient(host).stream(PATH, headers=host.headers(), query=query) as response:
        assert chunks(await response.read_all_events()) == [4]
    async with AsgiClient(host).stream(PATH, headers=host.headers(last_event_id="1"), query=query) as response:
        assert chunks(await response.read_all_events()) == [2, 3, 4]


@pytest.mark.parametrize("name", ["lastEventId", "lastEventID", "Last-Event-ID", "last-event-id"])
async def test_other_spellings_in_the_query_resume_too(host: FakeHost, name: str) -> None:
    """They were ignored, so a client got the whole stream again at every reconnect."""
    await host.create()
    await host.append(*range(3))
    await host.finish()
    response = await AsgiClient(host).get(PATH, headers=host.headers(), query={name: "1"})
    assert b"id: 2\ndata: 2\n\n" in response.body and b"id: 1\n" not in response.body


async def test_an_empty_last_event_id_starts_at_the_beginning(host: FakeHost) -> None:
    await host.create()
    await host.append(0)
    await host.finish()
    assert chunks(await read(host, "")) == [0]


@on_one_loop
@pytest.mark.parametrize("last_event_id", ["-1", "1.0", "x", "1 2", "+1", "9" * 19, "١", "abc.5", "0x1"])
async def test_a_malformed_last_event_id_is_400(host: FakeHost, last_event_id: str) -> None:
    await host.create()
    response = await AsgiClient(host).get(PATH, headers=host.headers(), query={"last_event_id": last_event_id})
    assert response.status_code == 400
    assert json.loads(response.body)["code"] == "invalid_request"
    assert response.headers["access-control-allow-origin"] == "*"


async def test_a_long_catch_up_is_complete_and_in_order(host: FakeHost) -> None:
    await host.create()
    texts = [f"{number} " + "x" * 200 for number in range(2000)]
    await host.append(*texts)
    await host.finish()
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        bodies = [chunk async for chunk in response]
    assert max(map(len, bodies)) <= 64 * 1024
    assert len(bodies) < 15  # chunks are joined
    assert [line for body in bodies for line in body.splitlines() if line.startswith(b"id:")][:-1] == [
        b"id: %d" % number for number in range(2000)
    ]


# Gaps


def small() -> FakeHost:
    """A host that retains few chunks."""
    return FakeHost(retention=Retention(stream_bytes=200), cors=Cors())


async def test_a_position_before_the_retained_part_gets_a_gap() -> None:
    host = small()
    await host.create()
    for number in range(20):
        await host.append(f"{number:40}")
    first = (await host.broker.read(StreamKey("run_1", "default"))).first
    assert first > 5
    await host.finish()
    gap, *rest = await read(host, "4")
    assert (gap.event, json.loads(gap.data)) == ("gap", {"requested": 5, "first": first})
    assert gap.id == str(first - 1)
    assert [int(text) for text in chunks(rest)] == list(range(first, 20))
    # a client that disconnects right after the gap misses nothing and gets no second gap
    assert [event.event for event in await read(host, gap.id)] == ["message"] * (20 - first) + ["end"]


async def test_a_new_subscriber_gets_a_gap_too() -> None:
    host = small()
    await host.create()
    for number in range(20):
        await host.append(f"{number:40}")
    await host.finish()
    gap = (await read(host))[0]
    assert (gap.event, json.loads(gap.data)["requested"]) == ("gap", 0)


async def test_a_subscriber_overtaken_by_trimming_gets_a_gap() -> None:
    host = small()
    await host.create()
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        await response.chunk()
        await host.append("first")
        await anyio.wait_all_tasks_blocked()  # the subscription is sending the first chunk
        for number in range(1, 20):
            await host.append(f"{number:40}")
        await host.finish()
        events = await response.read_all_events()
    assert [event.event for event in events[:2]] == ["message", "gap"]
    assert json.loads(events[1].data)["requested"] == 1
    first = json.loads(events[1].data)["first"]
    assert [int(text) for text in chunks(events[2:])] == list(range(first, 20))


# Streams that cannot be followed


async def test_a_failing_log_ends_the_body_without_an_end_event(host: FakeHost, monkeypatch: Any) -> None:
    await host.create()
    await host.append("a")
    lives: list[LiveLog] = []
    enter = LiveLog.enter

    def entering(live: LiveLog) -> None:
        lives.append(live)
        enter(live)

    monkeypatch.setattr(LiveLog, "enter", entering)
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        await response.read_until("message")
        lives[0].fail(BrokerUnavailable("gone"))
        assert await response.read_all_events() == []
        assert response.ended


async def test_removing_a_run_ends_its_subscriptions(host: FakeHost) -> None:
    await host.create()
    await host.append("a")
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        await response.read_until("message")
        await host.broker.remove("run_1")
        assert await response.read_all_events() == []
    again = await AsgiClient(host).get(PATH, headers=host.headers("read:runs"))
    assert again.status_code == 404


async def test_removing_an_ended_run_still_sends_its_end(host: FakeHost) -> None:
    """It looked like a lost connection, and reconnecting gave 404."""
    await host.create()
    await host.append("a")
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        await response.read_until("message")
        await host.append("b")
        await host.finish()
        await host.broker.remove("run_1")
        with anyio.fail_after(GUARD_S):
            events = await response.read_all_events()
    assert chunks(events) == ["b"]
    assert events[-1].event == "end"


async def test_a_run_removed_after_its_lookup_is_404(host: FakeHost, monkeypatch: Any) -> None:
    record = await host.create()
    await host.broker.remove("run_1")

    async def get(run_id: str) -> Any:
        return record

    monkeypatch.setattr(host, "get", get)
    response = await AsgiClient(host).get(PATH, headers=host.headers())
    assert response.status_code == 404


async def test_an_unexpected_error_after_the_head_ends_the_body(
    host: FakeHost, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    await host.create()
    await host.append("a")
    monkeypatch.setattr(Framing, "take", lambda framing, live, after: 1 / 0)
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        assert await response.read_all_events() == []
        assert response.ended
    assert "its client will resume" in caplog.text


# Tokens


@on_one_loop
@pytest.mark.parametrize(
    "scope",
    ["read:runs:run_1", "read:runs", "read:tasks:chat", "read:tags:user:1", "read:batch:batch_1", "read:all", "admin"],
)
async def test_a_scope_for_any_name_of_the_run_grants_access(host: FakeHost, scope: str) -> None:
    await host.create(tags=["x", "user:1"], batch=BatchMember("batch_1", 0, 1))
    async with AsgiClient(host).stream(PATH, headers=host.headers(scope)) as response:
        assert response.status_code == 200


async def test_the_secret_key_grants_access(host: FakeHost) -> None:
    await host.create()
    async with AsgiClient(host).stream(PATH, headers={"authorization": f"Bearer {SECRET}"}) as response:
        assert response.status_code == 200


async def test_a_token_for_another_run_is_403(host: FakeHost) -> None:
    await host.create()
    response = await AsgiClient(host).get(PATH, headers=host.headers("read:runs:run_2"))
    body = json.loads(response.body)
    assert response.status_code == 403
    assert body["param"] == "access_token"
    assert "read:runs:run_1" in body["error"]
    assert response.headers["access-control-allow-origin"] == "*"


async def test_a_missing_token_is_401_even_for_an_unknown_run(host: FakeHost) -> None:
    response = await AsgiClient(host).get(PATH)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["access-control-allow-origin"] == "*"
    assert set(json.loads(response.body)) == {"error", "code"}


# Keys, hidden streams and hidden columns


@pytest.mark.parametrize(("length", "status"), [(128, 200), (129, 422)])
async def test_a_key_over_the_limit_is_422(host: FakeHost, length: int, status: int) -> None:
    await host.create()
    async with AsgiClient(host).stream(f"/v1/streams/run_1/{'k' * length}", headers=host.headers()) as response:
        assert response.status_code == status
        if status == 422:
            assert b"limit 128" in await response.read()


async def test_a_key_with_a_control_character_is_422(host: FakeHost) -> None:
    await host.create()
    response = await AsgiClient(host).get("/v1/streams/run_1/a\nb", headers=host.headers())
    assert response.status_code == 422


async def test_a_stream_can_end_before_its_run(host: FakeHost) -> None:
    await host.create()
    await host.change("run_1", StreamAdded("default"))
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        await response.chunk()
        await host.broker.append(StreamKey("run_1", "default"), [b"1"], end=End("lost"))
        message, end = await response.read_all_events()
    assert (message.data, json.loads(end.data)) == ("1", {"reason": "lost"})


async def test_hidden_streams_cannot_be_read_by_name(host: FakeHost) -> None:
    await host.create()
    response = await AsgiClient(host).get("/v1/streams/run_1/$trigger.input:x", headers=host.headers())
    assert response.status_code == 422
    assert "starts with $" in json.loads(response.body)["error"]


async def test_a_stream_does_not_reveal_the_columns_that_the_token_hides(host: FakeHost) -> None:
    await host.create()
    await host.append("x", key="internal")
    token = host.token("read:runs", skip_columns=["error", "realtimeStreams"])
    headers = {"authorization": f"Bearer {token}"}
    async with AsgiClient(host).stream(PATH, headers=headers) as response:
        assert b"internal" not in await response.chunk()
        await host.finish(status=Status.FAILED, error="the secret reason")
        assert b'data: {"reason":"failed"}' in await response.read()


# Entries that this process does not hold


@pytest.fixture
async def tail_host(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> FakeHost:
    """A host whose process holds only the newest part of a stream, as with Redis."""
    await host.create()
    await host.append(*(f"{number} " + "x" * 20_000 for number in range(10)))

    @asynccontextmanager
    async def live(key: StreamKey) -> AsyncIterator[LiveLog]:
        page = await host.broker.read(key)
        tail = LiveLog(Log())
        tail.log.append([entry.data for entry in page.entries], 0)
        tail.log.trim(50_000)
        if page.end is not None:
            tail.log.close(page.end)
        yield tail

    monkeypatch.setattr(host.broker, "live", live)
    return host


async def test_older_entries_are_read_from_the_broker_in_bounded_bodies(tail_host: FakeHost) -> None:
    await tail_host.finish()
    async with AsgiClient(tail_host).stream(PATH, headers=tail_host.headers()) as response:
        bodies = [chunk async for chunk in response]
    assert max(map(len, bodies)) <= 64 * 1024
    events = EventParser().feed(b"".join(bodies))
    assert [int(text.split()[0]) for text in chunks(events)] == list(range(10))
    assert events[-1].event == "end"


async def test_a_shutdown_ends_a_catch_up_between_two_bodies(tail_host: FakeHost) -> None:
    async with AsgiClient(tail_host).stream(PATH, headers=tail_host.headers()) as response:
        await response.read_until("message")
        tail_host.begin_shutdown()
        events = await response.read_all_events()
    assert len(events) < 8
    assert events[-1].event == "reconnect"


async def test_entries_that_disappear_during_a_catch_up_make_the_client_reconnect(
    tail_host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = tail_host.broker.read

    async def empty(key: StreamKey, *, after: int = -1, limit: int = 500) -> Page:
        page = await read(key, after=after, limit=limit)
        return page if after < 0 else page._replace(entries=[])

    monkeypatch.setattr(tail_host.broker, "read", empty)
    async with AsgiClient(tail_host).stream(PATH, headers=tail_host.headers(last_event_id="0")) as response:
        assert kinds(await response.read_all_events()) == ["reconnect"]
