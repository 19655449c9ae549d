from __future__ import annotations

import json
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from asgi_realtime.asgi import subscription
from asgi_realtime.asgi.framing import NativeFraming
from asgi_realtime.asgi.subscription import MAX_RECONNECT_MS, MIN_RECONNECT_MS, reconnect_response
from asgi_realtime.brokers.base import StreamKey
from asgi_realtime.brokers.live_log import LiveLog
from asgi_realtime.core.config import Cors, Limits, Retention, Timeouts
from asgi_realtime.core.errors import BrokerUnavailable
from asgi_realtime.core.log import End
from asgi_realtime.core.runs import BatchMember, Status, StreamAdded
from asgi_realtime.testing import AsgiClient, Event, EventParser
from asgi_realtime.testing.driver import make_scope
from tests.asgi.fake_host import SECRET, FakeHost

pytestmark = pytest.mark.anyio

PATH = "/v1/streams/run_1/default"


def data(events: list[Event]) -> list[Any]:
    return [json.loads(event.data) for event in events if event.event == "message"]


async def read(host: FakeHost, last_event_id: str | None = None, path: str = PATH) -> list[Event]:
    """All events of a stream that ends."""
    more = {} if last_event_id is None else {"last-event-id": last_event_id}
    async with AsgiClient(host).stream(path, headers={**host.headers(), **more}) as response:
        assert response.status_code == 200
        return await response.read_all_events()


# Head and first body


async def test_head_and_first_body_come_at_once(host: FakeHost) -> None:
    await host.create()
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["cache-control"] == "no-cache, no-transform"
        assert response.headers["x-accel-buffering"] == "no"
        assert response.headers["access-control-allow-origin"] == "*"
        assert "content-length" not in response.headers
        first = await response.chunk()
    assert first.startswith(b"retry: 1000\n\n: ")
    assert first.endswith(b"\n\n")


async def test_the_comment_names_the_streams_that_the_run_has_if_nobody_wrote_this_one(host: FakeHost) -> None:
    await host.create()
    await host.append("x", key="other")
    await host.append("x", key='tricky"\n')
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        first = await response.chunk()
    assert b'stream "default" is not written yet; this run has ["other","tricky\\"\\n"]' in first


async def test_the_comment_is_short_for_a_stream_that_is_there(host: FakeHost) -> None:
    await host.create()
    await host.append("x")
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        assert await response.chunk() == b"retry: 1000\n\n: connected\n\n"


# Chunks, end and resume


async def test_chunks_then_the_end_on_the_wire(host: FakeHost) -> None:
    await host.create()
    await host.append("a", {"b": 1})
    await host.finish()
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        body = await response.read()
        assert response.ended
    assert body == (
        b"retry: 1000\n\n: connected\n\n"
        b'id: 0\ndata: "a"\n\nid: 1\ndata: {"b":1}\n\n'
        b'event: end\nid: 2\ndata: {"reason":"complete"}\n\n'
    )


async def test_chunks_come_as_they_are_written(host: FakeHost) -> None:
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


async def test_a_failure_and_its_message_are_told(host: FakeHost) -> None:
    await host.create()
    await host.append("a")
    await host.finish(status=Status.FAILED, error="no more tokens")
    (*_, end) = await read(host)
    assert (end.event, json.loads(end.data)) == ("end", {"reason": "failed", "error": "no more tokens"})


@pytest.mark.parametrize("last_event_id", range(5))
async def test_resume_from_every_position_gives_the_rest(host: FakeHost, last_event_id: int) -> None:
    await host.create()
    await host.append(*range(5))
    await host.finish()
    events = await read(host, str(last_event_id))
    assert data(events) == list(range(last_event_id + 1, 5))
    assert events[-1].event == "end"


@pytest.mark.parametrize("last_event_id", ["5", "6", "999999999999"])
async def test_resume_behind_the_end_of_a_finished_stream_is_204(host: FakeHost, last_event_id: str) -> None:
    await host.create()
    await host.append(*range(5))
    await host.finish()
    response = await AsgiClient(host).get(PATH, headers=host.headers(last_event_id=last_event_id))
    assert (response.status_code, response.body) == (204, b"")
    assert response.headers["access-control-allow-origin"] == "*"


async def test_who_is_ahead_of_a_stream_that_was_lost_is_told(host: FakeHost) -> None:
    """A 204 would say that everything is there."""
    await host.create()
    await host.append(*range(3))
    await host.broker.append(StreamKey("run_1", "default"), [], end=End("lost", "entries were lost"))
    assert [json.loads(event.data) for event in await read(host, "7")] == [
        {"reason": "lost", "error": "entries were lost"}
    ]
    response = await AsgiClient(host).get(PATH, headers=host.headers(last_event_id="3"))
    assert response.status_code == 204


async def test_an_empty_stream_ends_and_an_event_source_that_comes_back_is_stopped(host: FakeHost) -> None:
    await host.create()
    await host.finish()
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        (end,) = await response.read_all_events()
    assert (end.event, end.id) == ("end", "0")
    again = await AsgiClient(host).get(PATH, headers=host.headers(last_event_id="0"))
    assert again.status_code == 204


async def test_beyond_the_end_of_an_open_stream_it_waits(host: FakeHost) -> None:
    await host.create()
    await host.append(0)
    async with AsgiClient(host).stream(PATH, headers=host.headers(last_event_id="2")) as response:
        await response.chunk()
        await host.append(1, 2)
        await host.append(3)
        assert data(await response.read_events()) == [3]


async def test_a_stream_that_ends_before_the_position_is_ended(host: FakeHost) -> None:
    await host.create()
    await host.append(0)
    async with AsgiClient(host).stream(PATH, headers=host.headers(last_event_id="7")) as response:
        await response.chunk()
        await host.finish()
        (end,) = await response.read_all_events()
    assert (end.event, end.id) == ("end", "1")


async def test_the_query_resumes_as_well_and_the_header_wins(host: FakeHost) -> None:
    await host.create()
    await host.append(*range(5))
    await host.finish()
    query = {"last_event_id": "3"}
    async with AsgiClient(host).stream(PATH, headers=host.headers(), query=query) as response:
        assert data(await response.read_all_events()) == [4]
    async with AsgiClient(host).stream(PATH, headers=host.headers(last_event_id="1"), query=query) as response:
        assert data(await response.read_all_events()) == [2, 3, 4]


async def test_an_empty_last_event_id_is_none(host: FakeHost) -> None:
    await host.create()
    await host.append(0)
    await host.finish()
    assert data(await read(host, "")) == [0]


@pytest.mark.parametrize("last_event_id", ["-1", "1.0", "x", "1 2", "+1", "9" * 19, "١", "abc.5", "0x1"])
async def test_a_last_event_id_that_is_no_number_is_400_before_any_head(host: FakeHost, last_event_id: str) -> None:
    await host.create()
    response = await AsgiClient(host).get(PATH, headers=host.headers(), query={"last_event_id": last_event_id})
    assert response.status_code == 400
    assert json.loads(response.body)["code"] == "invalid_request"
    assert response.headers["access-control-allow-origin"] == "*"


async def test_a_long_catch_up_is_complete_and_in_order(host: FakeHost) -> None:
    await host.create()
    chunks = [f"{number} " + "x" * 200 for number in range(2000)]
    await host.append(*chunks)
    await host.finish()
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        bodies = [chunk async for chunk in response]
    assert max(map(len, bodies)) <= 64 * 1024
    assert len(bodies) < 15  # joined
    assert [line for body in bodies for line in body.splitlines() if line.startswith(b"id:")][:-1] == [
        b"id: %d" % number for number in range(2000)
    ]


# Gaps


def small(**limits: int) -> FakeHost:
    return FakeHost(retention=Retention(stream_bytes=200), cors=Cors())


async def test_a_position_before_the_retained_part_is_told_as_a_gap() -> None:
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
    assert [int(text) for text in data(rest)] == list(range(first, 20))
    # a drop right after the gap event: nothing is told twice, nothing is missing
    assert [event.event for event in await read(host, gap.id)] == ["message"] * (20 - first) + ["end"]


async def test_a_gap_is_told_to_a_new_reader_too() -> None:
    host = small()
    await host.create()
    for number in range(20):
        await host.append(f"{number:40}")
    await host.finish()
    gap = (await read(host))[0]
    assert (gap.event, json.loads(gap.data)["requested"]) == ("gap", 0)


async def test_a_reader_that_is_overtaken_by_retention_is_told() -> None:
    host = small()
    await host.create()
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        await response.chunk()
        await host.append("first")
        await anyio.wait_all_tasks_blocked()  # the reader stands in send() with the first chunk
        for number in range(1, 20):
            await host.append(f"{number:40}")
        await host.finish()
        events = await response.read_all_events()
    assert [event.event for event in events[:2]] == ["message", "gap"]
    assert json.loads(events[1].data)["requested"] == 1
    first = json.loads(events[1].data)["first"]
    assert [int(text) for text in data(events[2:])] == list(range(first, 20))


# What cannot be followed


async def test_a_log_that_fails_ends_the_body_without_an_end_event(host: FakeHost, monkeypatch: Any) -> None:
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


async def test_a_run_that_is_removed_ends_its_readers(host: FakeHost) -> None:
    await host.create()
    await host.append("a")
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        await response.read_until("message")
        await host.broker.remove("run_1")
        assert await response.read_all_events() == []
    again = await AsgiClient(host).get(PATH, headers=host.headers("read:runs"))
    assert again.status_code == 404


async def test_a_run_that_is_removed_when_it_is_over_ends_its_readers_for_good(host: FakeHost) -> None:
    """A run that was evicted as it ended looked like a lost connection, and coming back gave 404."""
    await host.create()
    await host.append("a")
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        await response.chunk()
        await host.finish()
        await host.broker.remove("run_1")
        with anyio.fail_after(5):
            events = await response.read_all_events()
    assert data(events) == ["a"]
    assert events[-1].event == "end"


async def test_a_run_that_is_gone_between_finding_and_following_is_404(host: FakeHost, monkeypatch: Any) -> None:
    record = await host.create()
    await host.broker.remove("run_1")

    async def get(run_id: str) -> Any:
        return record

    monkeypatch.setattr(host, "get", get)
    response = await AsgiClient(host).get(PATH, headers=host.headers())
    assert response.status_code == 404


async def test_an_error_of_the_broker_in_mid_stream_ends_the_body(
    host: FakeHost, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    await host.create()
    await host.append("a")
    monkeypatch.setattr(NativeFraming, "take", lambda framing, live, after: 1 / 0)
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        assert await response.read_all_events() == []
        assert response.ended
    assert "its client will resume" in caplog.text


# Tokens


@pytest.mark.parametrize(
    "scope",
    ["read:runs:run_1", "read:runs", "read:tasks:chat", "read:tags:user:1", "read:batch:batch_1", "read:all", "admin"],
)
async def test_any_scope_on_one_of_the_runs_names_admits(host: FakeHost, scope: str) -> None:
    await host.create(tags=["x", "user:1"], batch=BatchMember("batch_1", 0, 1))
    async with AsgiClient(host).stream(PATH, headers=host.headers(scope)) as response:
        assert response.status_code == 200


async def test_the_secret_key_admits(host: FakeHost) -> None:
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


async def test_no_token_is_401_even_for_a_run_that_is_not_there(host: FakeHost) -> None:
    response = await AsgiClient(host).get(PATH)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["access-control-allow-origin"] == "*"
    assert set(json.loads(response.body)) == {"error", "code"}


async def test_a_token_that_expires_ends_the_stream_where_it_stands() -> None:
    host = FakeHost()
    await host.create()
    await host.append("a")
    headers = {"authorization": f"Bearer {host.token(expires_in_s=60)}"}
    async with AsgiClient(host).stream(PATH, headers=headers) as response:
        await response.read_until("message")
        host.tick(59)
        host.tick(1)
        (*_, end) = await response.read_all_events()
        assert response.last_event_id == "0"  # so that a new token resumes where the old one stopped
    assert (end.event, json.loads(end.data)) == ("end", {"reason": "token_expired"})
    assert (await AsgiClient(host).get(PATH, headers=headers)).status_code == 401


async def test_expiry_ends_a_reader_that_is_never_through() -> None:
    host = FakeHost()
    await host.create()
    await host.append(*["x" * 60_000] * 20)
    headers = {"authorization": f"Bearer {host.token(expires_in_s=60)}"}
    async with AsgiClient(host).stream(PATH, headers=headers) as response:
        await response.read_until("message")
        host.tick(61)
        events = await response.read_all_events()
    assert len(events) < 10
    assert events[-1].event == "end"


async def test_a_stream_that_is_as_old_as_it_may_be_sends_its_reader_back() -> None:
    host = FakeHost(timeouts=Timeouts(stream_age=100))
    await host.create()
    await host.append("a")
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        await response.read_until("message")
        host.tick()
        host.tick(84)
        await host.append("b")
        assert [event.data for event in await response.read_events()] == ['"b"']
        host.tick(16)
        (event,) = await response.read_all_events()
        assert (event.event, event.id) == ("reconnect", "1")
        assert event.retry is not None and MIN_RECONNECT_MS <= event.retry <= MAX_RECONNECT_MS
        assert response.ended
    async with AsgiClient(host).stream(PATH, headers=host.headers(last_event_id="1")) as response:
        await host.append("c")
        assert [event.data for event in await response.read_events()] == ['"c"']


async def test_streams_that_were_opened_together_do_not_get_too_old_together() -> None:
    host = FakeHost(timeouts=Timeouts(stream_age=100, heartbeat=100))
    await host.create()
    async with anyio.create_task_group() as readers:
        for _ in range(40):
            readers.start_soon(read, host)
        await anyio.wait_all_tasks_blocked()
        assert len(host.subscribers) == 40
        host.tick()
        host.tick(92)
        await anyio.wait_all_tasks_blocked()
        assert 0 < len(host.subscribers) < 40
        host.tick(8)
        await anyio.wait_all_tasks_blocked()
        assert not host.subscribers


# Finding


async def test_an_unknown_run_is_404_at_once_unless_the_token_names_it(host: FakeHost) -> None:
    response = await AsgiClient(host).get(PATH, headers=host.headers("read:runs"))
    assert response.status_code == 404
    assert json.loads(response.body)["code"] == "run_not_found"


async def test_a_run_that_the_token_names_is_waited_for(host: FakeHost) -> None:
    async with anyio.create_task_group() as tasks:

        async def appear() -> None:
            await host.wait_for_subscriber()
            await anyio.wait_all_tasks_blocked()
            await host.create()

        tasks.start_soon(appear)
        async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
            assert response.status_code == 200
            await response.chunk()
            await host.append("a")
            assert data(await response.read_events()) == ["a"]


async def test_a_run_that_never_comes_is_404_after_a_while(host: FakeHost) -> None:
    async with anyio.create_task_group() as tasks:

        async def wait() -> None:
            await host.wait_for_subscriber()
            await anyio.wait_all_tasks_blocked()
            host.tick(0)
            host.tick(4.9)
            await anyio.wait_all_tasks_blocked()
            assert host.subscribers
            host.tick(0.1)

        tasks.start_soon(wait)
        response = await AsgiClient(host).get(PATH, headers=host.headers())
    assert response.status_code == 404
    assert not host.subscribers
    assert host.app.subscription_limits.open == 0


async def test_waiting_for_a_run_ends_with_the_shutdown(host: FakeHost) -> None:
    """The page was told 404, after which an EventSource never comes back, though the run came a moment later."""
    async with anyio.create_task_group() as tasks:

        async def shut_down() -> None:
            await host.wait_for_subscriber()
            await anyio.wait_all_tasks_blocked()
            host.begin_shutdown()

        tasks.start_soon(shut_down)
        async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
            assert (response.status_code, response.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
            assert [event.event for event in await response.read_all_events()] == ["reconnect"]
    assert not host.subscribers


async def test_who_asks_for_an_unknown_run_during_the_shutdown_is_told_to_come_back(host: FakeHost) -> None:
    host.begin_shutdown()
    response = await AsgiClient(host).get(PATH, headers=host.headers())
    assert (response.status_code, response.headers["access-control-allow-origin"]) == (200, "*")
    assert response.body.startswith(b"retry: 1000\n\n: connected\n\nevent: reconnect\n")
    assert (await AsgiClient(host).get(PATH, headers=host.headers("read:runs"))).status_code == 404


async def test_waiting_for_a_run_ends_when_the_client_leaves(host: FakeHost) -> None:
    async def gone() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await host(make_scope("GET", PATH, headers=host.headers()), gone, send)
    assert not host.subscribers
    assert sent[0]["status"] == 404


# Heartbeat, stalled readers, disconnect, shutdown


async def test_silence_is_broken_by_a_heartbeat() -> None:
    host = FakeHost(timeouts=Timeouts(heartbeat=15))
    await host.create()
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        await response.chunk()
        await anyio.wait_all_tasks_blocked()
        host.tick()  # sees that something was sent
        host.tick(14)
        await anyio.wait_all_tasks_blocked()
        host.tick(1)
        assert await response.chunk() == b": heartbeat\n\n"
        await anyio.wait_all_tasks_blocked()
        host.tick()
        host.tick(14.9)
        await host.append("a")
        assert data(await response.read_events()) == ["a"]  # no heartbeat before it


async def test_a_shutdown_while_a_heartbeat_is_sent_is_heard() -> None:
    """The reader was left waiting for the next heartbeat, and the server could not exit."""
    host = FakeHost(timeouts=Timeouts(heartbeat=15))
    await host.create()
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        await response.chunk()
        await anyio.wait_all_tasks_blocked()
        host.tick()
        host.tick(15)
        await anyio.wait_all_tasks_blocked()  # the heartbeat is in `send`, as nobody reads
        host.begin_shutdown()
        assert await response.chunk() == b": heartbeat\n\n"
        with anyio.fail_after(5):
            (event,) = await response.read_all_events()
    assert event.event == "reconnect"


async def test_a_reader_that_does_not_read_is_dropped_and_costs_nothing() -> None:
    host = FakeHost(timeouts=Timeouts(send=30))
    await host.create()
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        await anyio.wait_all_tasks_blocked()  # in the send of the first body
        host.tick()
        for _ in range(50):
            await host.append("x" * 10_000)  # the producer is not delayed
        host.tick(29)
        await anyio.wait_all_tasks_blocked()
        assert host.subscribers
        host.tick(1)
        await anyio.wait_all_tasks_blocked()
        assert not host.subscribers
        assert host.app.subscription_limits.open == 0
        assert not response.ended  # a cut body: the client resumes
    await no_readers(host)


async def test_a_stalled_send_that_cannot_be_cancelled_gives_its_seat_back() -> None:
    host = FakeHost(timeouts=Timeouts(send=30))
    await host.create()
    release = anyio.Event()

    async def shielding(scope: Any, receive: Any, send: Any) -> None:
        async def shielded(message: Any) -> None:
            with anyio.CancelScope(shield=True):
                await release.wait()

        await host(scope, receive, shielded)

    async def never() -> Any:
        await anyio.sleep_forever()

    scope = make_scope("GET", PATH, headers=host.headers())
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(shielding, scope, never, None)
        await anyio.wait_all_tasks_blocked()
        host.tick()
        host.tick(30)
        assert host.app.subscription_limits.open == 0
        release.set()
        await anyio.wait_all_tasks_blocked()
        assert not host.subscribers
        assert host.app.subscription_limits.open == 0
        tasks.cancel_scope.cancel()


@pytest.mark.slow
async def test_a_slow_reader_is_not_dropped_while_it_reads() -> None:
    host = FakeHost(timeouts=Timeouts(send=30))
    await host.create()
    await host.append(*["x" * 60_000] * 5)
    await host.finish()
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        events: list[Event] = []
        while not response.ended:
            await anyio.wait_all_tasks_blocked()
            host.tick()
            host.tick(29)
            events += await response.read_events()
    assert [event.event for event in events] == ["message"] * 5 + ["end"]


async def test_one_stalled_reader_does_not_delay_another(host: FakeHost) -> None:
    await host.create()
    headers = host.headers()
    async with AsgiClient(host).stream(PATH, headers=headers):
        async with AsgiClient(host).stream(PATH, headers=headers) as reader:
            await reader.chunk()
            for number in range(20):
                await host.append(number)
                assert data(await reader.read_events()) == [number]


async def no_readers(host: FakeHost) -> None:
    """Nobody follows the stream, and a watcher that is being ended is through."""
    await anyio.wait_all_tasks_blocked()
    async with host.broker.live(StreamKey("run_1", "default")) as live:
        assert live.readers == 1
        assert len(live.waiting) == 0
    assert not host.subscribers
    assert host.app.subscription_limits.open == 0


async def test_a_disconnect_leaves_nothing_behind(host: FakeHost) -> None:
    await host.create()
    await host.append("a")
    await anyio.wait_all_tasks_blocked()
    before = len(anyio.get_running_tasks())
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        await response.read_until("message")
        await anyio.wait_all_tasks_blocked()
        assert len(host.subscribers) == 1
    await no_readers(host)
    assert len(anyio.get_running_tasks()) == before


async def test_a_disconnect_while_sending_leaves_nothing_behind(host: FakeHost) -> None:
    await host.create()
    await host.append("a")
    async with AsgiClient(host).stream(PATH, headers=host.headers()):
        await anyio.wait_all_tasks_blocked()
    await no_readers(host)


@pytest.mark.slow
async def test_a_thousand_connections_come_and_go(host: FakeHost) -> None:
    await host.create()
    await host.append("a")
    headers = host.headers()
    await anyio.wait_all_tasks_blocked()
    before = len(anyio.get_running_tasks())
    for number in range(1000):
        async with AsgiClient(host).stream(PATH, headers=headers) as response:
            for _ in range(number % 4):
                await response.chunk() if number % 4 < 3 else await anyio.lowlevel.checkpoint()
    await no_readers(host)
    assert len(anyio.get_running_tasks()) == before


@pytest.mark.parametrize("error", [OSError("gone"), BrokenPipeError()])
async def test_an_oserror_of_send_is_a_disconnect(
    host: FakeHost, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    await host.create()
    await host.append("a")

    async def never() -> Any:
        await anyio.sleep_forever()

    async def send(message: Any) -> None:
        if message.get("body"):
            raise error

    await host(make_scope("GET", PATH, headers=host.headers()), never, send)
    await no_readers(host)
    assert not caplog.records


async def test_the_hosts_cancellation_passes_and_leaves_nothing_behind(host: FakeHost) -> None:
    await host.create()
    with anyio.CancelScope() as scope:
        async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
            await response.chunk()
            await anyio.wait_all_tasks_blocked()
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    await no_readers(host)


async def test_shutdown_ends_each_stream_with_reconnect_and_a_time_of_its_own(host: FakeHost) -> None:
    await host.create()
    await host.append("a")
    headers = host.headers()
    retries: list[int] = []
    for _ in range(40):
        host.closing = False
        async with AsgiClient(host).stream(PATH, headers=headers) as response:
            await response.read_until("message")
            await anyio.wait_all_tasks_blocked()
            host.begin_shutdown()
            (event,) = await response.read_all_events()
            assert response.ended
        assert event.event == "reconnect"
        assert event.id == "0"  # the resume point stays
        assert event.retry is not None
        assert json.loads(event.data) == {"retry": event.retry}
        retries.append(event.retry)
    assert all(250 <= retry <= 3000 for retry in retries)
    assert len(set(retries)) > 10


async def test_the_times_to_come_back_are_spread_evenly_over_what_is_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(subscription, "SHUTDOWN_RECONNECT_MS", 300)
    retries = [EventParser().feed(bytes(reconnect_response().body))[0].retry for _ in range(200)]
    assert set(retries) <= set(range(MIN_RECONNECT_MS, 301))
    assert retries.count(MIN_RECONNECT_MS) < 40  # one in 51, and not all that would lie below


async def test_who_comes_during_the_shutdown_is_told_at_once(host: FakeHost) -> None:
    await host.create()
    await host.append(*["x" * 60_000] * 20)
    host.begin_shutdown()
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        assert response.status_code == 200
        assert [event.event for event in await response.read_all_events()] == ["reconnect"]


async def test_a_stream_that_is_through_ends_for_good_at_shutdown(host: FakeHost) -> None:
    await host.create()
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        await response.chunk()
        await anyio.wait_all_tasks_blocked()
        await host.finish()
        host.begin_shutdown()
        assert [event.event for event in await response.read_all_events()] == ["end"]


async def test_a_stalled_reader_does_not_hold_up_the_shutdown(host: FakeHost) -> None:
    await host.create()
    async with AsgiClient(host).stream(PATH, headers=host.headers()):
        await anyio.wait_all_tasks_blocked()
        host.begin_shutdown()
        host.tick()
        host.tick()
        host.tick()
        await anyio.wait_all_tasks_blocked()
        assert not host.subscribers


# Limits


async def limited(host: FakeHost, headers: dict[str, str] | None = None, path: str = PATH) -> dict[str, Any]:
    response = await AsgiClient(host).get(path, headers=headers or host.headers())
    assert response.status_code == 429
    body: dict[str, Any] = json.loads(response.body)
    assert body["code"] == "limit_exceeded"
    return body


async def test_subscriptions_are_limited_in_the_process() -> None:
    host = FakeHost(limits=Limits(subscribers=1))
    await host.create()
    async with AsgiClient(host).stream(PATH, headers=host.headers()):
        assert "limit 1" in (await limited(host))["error"]
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        assert response.status_code == 200


async def test_subscriptions_are_limited_for_each_run() -> None:
    host = FakeHost(limits=Limits(subscribers_per_run=1))
    await host.create()
    await host.create("run_2")
    headers = host.headers("read:runs")
    async with AsgiClient(host).stream(PATH, headers=headers):
        assert "this run" in (await limited(host, headers))["error"]
        async with AsgiClient(host).stream("/v1/streams/run_2/default", headers=headers) as response:
            assert response.status_code == 200


async def test_subscriptions_are_limited_for_each_token_but_not_for_the_secret_key() -> None:
    host = FakeHost(limits=Limits(subscribers_per_token=1))
    await host.create()
    headers = host.headers()
    secret = {"authorization": f"Bearer {SECRET}"}
    async with AsgiClient(host).stream(PATH, headers=headers):
        assert "this token" in (await limited(host, headers))["error"]
        async with AsgiClient(host).stream(PATH, headers=host.headers("read:all")) as response:
            assert response.status_code == 200
        async with AsgiClient(host).stream(PATH, headers=secret):
            async with AsgiClient(host).stream(PATH, headers=secret) as response:
                assert response.status_code == 200


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


async def test_messages_are_fresh_for_each_send(host: FakeHost) -> None:
    """A host's compression writes into the message that it gets; that must not reach other readers."""
    await host.create()
    await host.append("a")
    await host.finish()

    async def compressing(scope: Any, receive: Any, send: Any) -> None:
        async def spoil(message: Any) -> None:
            await send(dict(message))
            message["body"] = b"spoilt"
            if "headers" in message:
                message["headers"].append((b"spoilt", b"yes"))

        await host(scope, receive, spoil)

    for _ in range(2):
        async with AsgiClient(compressing).stream(PATH, headers=host.headers()) as response:
            assert "spoilt" not in response.headers
            assert b"spoilt" not in await response.read()


async def test_streams_with_an_end_of_their_own_end_before_the_run(host: FakeHost) -> None:
    await host.create()
    await host.change("run_1", StreamAdded("default"))
    async with AsgiClient(host).stream(PATH, headers=host.headers()) as response:
        await response.chunk()
        await host.broker.append(StreamKey("run_1", "default"), [b"1"], end=End("lost"))
        message, end = await response.read_all_events()
    assert (message.data, json.loads(end.data)) == ("1", {"reason": "lost"})


async def test_the_library_s_own_streams_are_not_read_by_name(host: FakeHost) -> None:
    await host.create()
    response = await AsgiClient(host).get("/v1/streams/run_1/$trigger.input:x", headers=host.headers())
    assert response.status_code == 422
    assert "starts with $" in json.loads(response.body)["error"]


async def test_what_a_token_hides_of_a_run_its_streams_do_not_tell(host: FakeHost) -> None:
    await host.create()
    await host.append("x", key="internal")
    token = host.token("read:runs", skip_columns=["error", "realtimeStreams"])
    headers = {"authorization": f"Bearer {token}"}
    async with AsgiClient(host).stream(PATH, headers=headers) as response:
        assert b"internal" not in await response.chunk()
        await host.finish(status=Status.FAILED, error="the secret reason")
        assert b'data: {"reason":"failed"}' in await response.read()
