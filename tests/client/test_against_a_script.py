"""What the clients do with each answer that a server, or a proxy in front of it, can give."""

from __future__ import annotations

import logging
import threading
from typing import Any

import anyio
import pytest

from asgi_realtime import (
    ExpiredToken,
    InvalidToken,
    RealtimeError,
    RunCanceled,
    RunEnded,
    RunFailed,
    RunNotFound,
    ScopeDenied,
    StreamChunk,
    StreamGap,
    UsageError,
)
from asgi_realtime.client import RealtimeClient, ServerUnreachable, SyncRealtimeClient, UnexpectedAnswer
from asgi_realtime.core.errors import InvalidRequest, RunKeptElsewhere
from tests.client.reading import FakeTime, Outcome, read
from tests.client.scripted import END, HOLD, ScriptedServer, answer, chunk, refused, stream
from tests.inprocess import until

TOKEN = "aaa.bbb.ccc"


@pytest.fixture
def fake_time() -> FakeTime:
    return FakeTime()


def ask(kind: str, server: ScriptedServer, fake_time: FakeTime, token: Any = TOKEN, **options: Any) -> Outcome:
    return read(kind, server.origin, token, lambda client: client.read("run_1"), fake_time=fake_time, **options)


def test_a_request_is_as_the_protocol_says(kind: str, fake_time: FakeTime) -> None:
    with ScriptedServer(stream(END)) as server:
        told = read(
            kind,
            f"{server.origin}/realtime/",
            TOKEN,
            lambda client: client.read("run 1", "a%b", start_index=7),
            fake_time=fake_time,
        )
        assert (told.items, told.errors) == ([], [])
    (asked,) = server.requests
    assert asked.line == "GET /realtime/v1/streams/run%201/a%25b HTTP/1.1"
    assert asked.headers["accept"] == "text/event-stream"
    assert asked.headers["authorization"] == f"Bearer {TOKEN}"
    assert asked.headers["last-event-id"] == "6"
    assert TOKEN not in asked.line


@pytest.mark.parametrize(
    ("call", "path"),
    [
        (lambda client: client.subscribe_to_run("run_1"), "/v1/runs/run_1"),
        (lambda client: client.subscribe_to_batch("batch_1"), "/v1/batches/batch_1"),
        (lambda client: client.subscribe_to_runs_with_tag("user:1"), "/v1/runs?tags=user%3A1"),
        (
            lambda client: client.subscribe_to_runs_with_tag(["a&b", "c"], created_within="1h"),
            "/v1/runs?tags=a%26b%2Cc&createdAt=3600s",
        ),
    ],
)
def test_feeds_have_the_paths_of_the_protocol(kind: str, call: Any, path: str) -> None:
    with ScriptedServer(stream(END)) as server:
        read(kind, server.origin, TOKEN, call)
    assert [asked.line for asked in server.requests] == [f"GET {path} HTTP/1.1"]


def test_a_body_that_ends_without_an_end_is_resumed(kind: str, fake_time: FakeTime) -> None:
    answers = [stream(chunk(0, '"a"'), chunk(1, '"b"'), "id: 2\ndata: no"), stream(), stream(chunk(2, '"c"'), END)]
    answers[0] = answers[0].removesuffix(b"\n\n")  # an event without its empty line does not count
    with ScriptedServer(*answers) as server:
        told = ask(kind, server, fake_time)
    assert (told.items, told.errors) == (["a", "b", "c"], [])
    assert server.positions == [None, "1", "1"]


def test_pauses_grow_and_begin_again_after_progress(kind: str, fake_time: FakeTime) -> None:
    away = answer(503)
    with ScriptedServer(away, away, away, stream(chunk(0)), away, stream(END)) as server:
        told = ask(kind, server, fake_time)
    assert (told.items, told.errors) == ([0], [])
    assert fake_time.pauses == [1, 2, 4, 1, 2]


def test_pauses_are_drawn_at_random_and_have_an_end(kind: str, fake_time: FakeTime) -> None:
    fake_time.random = 0.0
    with ScriptedServer(*[answer(500)] * 9, stream(END)) as server:
        assert ask(kind, server, fake_time).errors == []
    assert fake_time.pauses == [0.5, 1, 2, 4, 8, 15, 15, 15, 15]


def test_the_reconnection_time_of_the_server_is_the_first_pause(kind: str, fake_time: FakeTime) -> None:
    with ScriptedServer(stream("retry: 3000"), answer(502), stream("retry: 0"), stream(END)) as server:
        assert ask(kind, server, fake_time).errors == []
    assert fake_time.pauses == pytest.approx([3, 6, 0.4])


@pytest.mark.parametrize(
    ("headers", "pause"),
    [
        ({"retry_after": "7"}, 7),
        ({"retry_after": "Wed, 21 Oct 2015 07:28:09 GMT", "date": "Wed, 21 Oct 2015 07:28:00 GMT"}, 9),
        ({"retry_after": "Wed, 21 Oct 2015 07:28:09 GMT"}, 1),
        ({"retry_after": "Wed, 21 Oct 2015 07:28:09", "date": "Wed, 21 Oct 2015 07:28:00 GMT"}, 1),
        ({"retry_after": "soon"}, 1),
        ({"retry_after": "9" * 400}, 3600),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_honoured(fake_time: FakeTime, headers: dict[str, str], pause: int, status: int) -> None:
    with ScriptedServer(answer(status, b"", **headers), stream(END)) as server:
        assert ask("sync", server, fake_time, give_up_after=None).errors == []
    assert fake_time.pauses == [pause]


def test_reconnect_is_taken_at_its_word(kind: str, fake_time: FakeTime) -> None:
    with ScriptedServer(
        stream(chunk(0), 'event: reconnect\nretry: 1234\ndata: {"retry":1234}'), stream(chunk(1), END)
    ) as server:
        told = ask(kind, server, fake_time)
    assert told.items == [0, 0]
    assert server.positions == [None, "0"]
    assert fake_time.pauses == [1.234]


def test_a_server_that_stays_away_is_given_up(kind: str, fake_time: FakeTime) -> None:
    with ScriptedServer(stream(chunk(0)), answer(503)) as server:
        told = ask(kind, server, fake_time, give_up_after=20, retries=1)
    assert told.items == [0]
    assert [type(error) for error in told.errors] == [ServerUnreachable, ServerUnreachable]
    assert str(told.error) == "gave up on /v1/streams/run_1/default: the server responded with 503"
    assert fake_time.pauses == [1, 2, 4, 8, 5, 1, 2, 4, 8, 5]
    assert set(server.positions[1:]) == {"0"}


def test_a_refused_connection_is_tried_again(kind: str, fake_time: FakeTime) -> None:
    with ScriptedServer(stream(END)) as server:
        pass
    told = ask(kind, server, fake_time, give_up_after=10)
    assert isinstance(told.error, ServerUnreachable)
    assert "ConnectError" in str(told.error)
    assert told.error.__cause__ is not None


@pytest.mark.slow
def test_silence_is_a_cut(kind: str, fake_time: FakeTime) -> None:
    with ScriptedServer(stream(chunk(0)) + HOLD, stream(chunk(1), END)) as server:
        told = ask(kind, server, fake_time, silence_timeout=0.2)
        assert server.disconnected.wait(10)
    assert (told.items, told.errors) == ([0, 0], [])
    assert server.positions == [None, "0"]


def test_what_was_read_to_its_end_ends_with_204(kind: str, fake_time: FakeTime) -> None:
    with ScriptedServer(answer(204)) as server:
        told = read(kind, server.origin, TOKEN, lambda client: client.read("run_1", start_index=9))
    assert (told.items, told.errors, server.positions) == ([], [], ["8"])


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ('{"reason":"failed","error":"no luck"}', RunFailed, "the run ended failed: no luck"),
        ('{"reason":"crashed"}', RunFailed, "the run ended crashed"),
        ('{"reason":"lost"}', RunFailed, "the run ended lost"),
        ('{"reason":"invented later"}', RunFailed, "the run ended invented later"),
        ('{"reason":"canceled"}', RunCanceled, "the run was canceled"),
    ],
)
def test_a_stream_raises_how_its_run_ended(kind: str, data: str, error: type[RunEnded], message: str) -> None:
    with ScriptedServer(stream(chunk(0), f"event: end\nid: 1\ndata: {data}")) as server:
        told = read(kind, server.origin, TOKEN, lambda client: client.read("run_1"), retries=1)
    assert told.items == [0]
    (raised,) = told.errors  # asked again it has ended
    assert type(raised) is error
    assert str(raised) == message
    assert len(server.requests) == 1


def test_a_gap_is_raised_once_and_what_is_kept_follows(kind: str, fake_time: FakeTime) -> None:
    gap = 'event: gap\nid: 14\ndata: {"requested":0,"first":15}'
    with ScriptedServer(stream(gap), stream(chunk(15, '"a"'), END)) as server:
        told = ask(kind, server, fake_time, retries=1)
    assert told.items == ["a"]
    (raised,) = told.errors
    assert isinstance(raised, StreamGap)
    assert (raised.requested, raised.first) == (0, 15)
    assert server.positions == [None, "14"]


def test_chunks_come_with_their_index(kind: str) -> None:
    with ScriptedServer(stream(chunk(3, '{"a":1}'), END)) as server:
        told = read(kind, server.origin, TOKEN, lambda client: client.read_indexed("run_1", "rows", start_index=3))
    assert told.items == [StreamChunk("rows", 3, {"a": 1})]


def test_a_long_event_arrives_whole(kind: str) -> None:
    text = "x" * (1024 * 1024)
    with ScriptedServer(stream(chunk(0, f'"{text}"'), END)) as server:
        told = read(kind, server.origin, TOKEN, lambda client: client.read("run_1"))
    assert told.items == [text]


# Refusals


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (400, "invalid_request", InvalidRequest),
        (401, "invalid_token", InvalidToken),
        (401, "token_expired", ExpiredToken),
        (403, "forbidden", ScopeDenied),
        (404, "run_not_found", RunNotFound),
        (404, "run_kept_elsewhere", RunKeptElsewhere),
        (404, "not_found", UnexpectedAnswer),
        (410, "stream_gap", UnexpectedAnswer),
        (422, "invalid", UsageError),
    ],
)
def test_a_refusal_is_raised_at_once(
    kind: str, fake_time: FakeTime, status: int, code: str, error: type[RealtimeError]
) -> None:
    with ScriptedServer(refused(status, code, "it is so")) as server:
        told = ask(kind, server, fake_time)
    assert type(told.error) is error
    assert "it is so" in str(told.error)
    assert (told.error.status, told.error.code) == (status, code)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("told", "status", "words"),
    [
        (
            answer(200, b"<html>", content_type="text/html"),
            200,
            "'text/html' instead of text/event-stream; set base_url",
        ),
        (answer(404, b"<h1>No</h1>"), 404, "the server responded with 404: '<h1>No</h1>'"),
        (answer(403), 403, "the server responded with 403"),
        (stream("id: 0\ndata: {"), 200, "an event that cannot be read"),
        (stream("data: 1"), 200, "an event that cannot be read"),
        (stream("event: end\ndata: []"), 200, "an event that cannot be read"),
        (stream("event: gap\nid: 1\ndata: {}"), 200, "an event that cannot be read"),
    ],
)
def test_what_is_no_answer_of_ours_is_told_apart(kind: str, told: bytes, status: int, words: str) -> None:
    with ScriptedServer(told) as server:
        error = read(kind, server.origin, TOKEN, lambda client: client.read("run_1")).error
    assert isinstance(error, UnexpectedAnswer)
    assert error.status == status
    assert words in str(error)


def test_a_401_of_a_proxy_is_a_refused_token(kind: str, fake_time: FakeTime) -> None:
    with ScriptedServer(answer(401, b"x" * 100_000)) as server:
        error = ask(kind, server, fake_time).error
    assert type(error) is InvalidToken
    assert len(str(error)) < 200


def test_no_redirect_is_followed(kind: str, fake_time: FakeTime) -> None:
    with ScriptedServer(stream(END)) as other, ScriptedServer(answer(307, location=f"{other.origin}/?x=y")) as server:
        error = ask(kind, server, fake_time, follow_redirects=True).error
    assert isinstance(error, UnexpectedAnswer)
    assert f"a redirect to '{other.origin}/', which is not followed" in str(error)
    assert other.requests == []


# Tokens


class Tokens:
    """A function for tokens that counts."""

    def __init__(self) -> None:
        self.given = 0

    def __call__(self) -> str:
        self.given += 1
        return f"token-{self.given}"

    async def later(self) -> str:
        await anyio.lowlevel.checkpoint()
        return self()


EXPIRED = 'event: end\ndata: {"reason":"token_expired"}'


@pytest.fixture
def function(kind: str) -> Any:
    """One that is async for one of the kinds."""
    tokens = Tokens()
    return tokens.later if kind == "asyncio" else tokens


@pytest.mark.parametrize(
    "answers",
    [[stream(chunk(0), EXPIRED)], [stream(chunk(0)), refused(401, "token_expired", "it has expired")]],
    ids=["event", "status"],
)
def test_a_new_token_is_asked_for_when_the_old_one_expires(
    kind: str, fake_time: FakeTime, function: Any, answers: list[bytes]
) -> None:
    with ScriptedServer(*answers, stream(chunk(1), END)) as server:
        told = ask(kind, server, fake_time, function)
    assert (told.items, told.errors) == ([0, 0], [])
    assert server.tokens == ["token-1"] * len(answers) + ["token-2"]
    assert server.positions[-1] == "0"


def test_a_token_is_kept_as_long_as_the_server_takes_it(kind: str, fake_time: FakeTime, function: Any) -> None:
    with ScriptedServer(stream(chunk(0)), answer(503), stream(END)) as server:
        ask(kind, server, fake_time, function)
    assert server.tokens == ["token-1"] * 3


def test_a_new_token_that_is_refused_too_is_raised(kind: str, fake_time: FakeTime, function: Any) -> None:
    with ScriptedServer(refused(401, "invalid_token", "no such key")) as server:
        told = ask(kind, server, fake_time, function, retries=1)
    assert [str(error) for error in told.errors] == ["no such key", "no such key"]
    assert [type(error) for error in told.errors] == [InvalidToken, InvalidToken]
    assert server.tokens == ["token-1", "token-2", "token-3", "token-4"]


def test_a_new_token_is_asked_for_when_the_old_one_does_not_admit(
    kind: str, fake_time: FakeTime, function: Any
) -> None:
    """The function may give tokens for the runs that a user has by now."""
    with ScriptedServer(refused(403, "forbidden", "not this run"), stream(chunk(0), END)) as server:
        told = ask(kind, server, fake_time, function)
    assert (told.items, told.errors) == ([0], [])
    assert server.tokens == ["token-1", "token-2"]


def test_a_new_token_that_does_not_admit_either_is_raised(kind: str, fake_time: FakeTime, function: Any) -> None:
    with ScriptedServer(refused(403, "forbidden", "not this run")) as server:
        error = ask(kind, server, fake_time, function).error
    assert type(error) is ScopeDenied
    assert server.tokens == ["token-1", "token-2"]


def test_each_new_token_that_was_of_use_may_be_replaced(kind: str, fake_time: FakeTime, function: Any) -> None:
    answers = [stream(chunk(index), EXPIRED) for index in range(4)]
    with ScriptedServer(*answers, stream(END)) as server:
        told = ask(kind, server, fake_time, function)
    assert (told.items, told.errors) == ([0] * 4, [])
    assert server.tokens == [f"token-{number}" for number in range(1, 6)]
    assert fake_time.pauses == []


@pytest.mark.parametrize("told", [stream(EXPIRED), refused(401, "token_expired", "the token has expired")])
def test_a_fixed_token_that_expires_is_raised(kind: str, fake_time: FakeTime, told: bytes) -> None:
    with ScriptedServer(told) as server:
        error = ask(kind, server, fake_time).error
    assert type(error) is ExpiredToken
    assert len(server.requests) == 1


def test_what_the_function_raises_is_raised(kind: str, fake_time: FakeTime) -> None:
    def broken() -> str:
        raise LookupError("no session")

    with ScriptedServer(stream(END)) as server:
        told = ask(kind, server, fake_time, broken)
    assert isinstance(told.error, LookupError)
    assert server.requests == []


@pytest.mark.parametrize("token", ["", "a\r\nb", "ä", "a b", None, 5])
def test_a_function_that_gives_no_token_is_told_so(kind: str, fake_time: FakeTime, token: Any) -> None:
    with ScriptedServer(stream(END)) as server:
        error = ask(kind, server, fake_time, lambda: token).error
    assert isinstance(error, InvalidToken)
    assert server.requests == []


def test_the_sync_client_takes_no_async_function(fake_time: FakeTime) -> None:
    with ScriptedServer(stream(END)) as server:
        error = ask("sync", server, fake_time, Tokens().later).error
    assert str(error) == "access_token is an async function; use it with RealtimeClient"


@pytest.mark.anyio
async def test_subscriptions_share_one_token() -> None:
    tokens = Tokens()
    with ScriptedServer(stream(END)) as server:
        async with RealtimeClient(server.origin, tokens.later) as client, anyio.create_task_group() as group:

            async def one() -> None:
                async for _ in client.read("run_1"):
                    pass

            for _ in range(5):
                group.start_soon(one)
    assert tokens.given == 1
    assert server.tokens == ["token-1"] * 5


def test_no_token_is_shown(kind: str, fake_time: FakeTime, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for name in ("httpcore", "httpx"):
        caplog.set_level(logging.DEBUG, logger=name)
    with ScriptedServer(answer(503), refused(401, "invalid_token", "no")) as server:
        error = ask(kind, server, fake_time).error
    assert TOKEN not in caplog.text
    assert "/v1/streams/run_1/default: the server responded with 503; next attempt in 1.0 s" in caplog.text
    assert TOKEN not in repr(error)


# Leaving


@pytest.mark.anyio
async def test_a_pause_goes_on_where_a_timeout_disturbed_it() -> None:
    with ScriptedServer(answer(503), stream(chunk(0), END)) as server:
        async with RealtimeClient(server.origin, TOKEN) as client:
            pauses: list[float] = []
            now = 0.0

            async def sleep(seconds: float) -> None:
                nonlocal now
                pauses.append(seconds)
                now += 0.75
                await anyio.sleep_forever() if seconds > 0.75 else await anyio.lowlevel.checkpoint()

            transport = client._transport
            transport.sleep, transport.clock, transport.random = sleep, lambda: now, lambda: 1.0
            chunks = client.read("run_1")
            with anyio.move_on_after(0.1):
                await anext(chunks)
            assert await anext(chunks) == 0
    assert pauses == [1, 0.25]


@pytest.mark.anyio
async def test_cancellation_closes_the_connection_and_loses_nothing() -> None:
    with ScriptedServer(stream(chunk(0)) + HOLD, stream(chunk(1, "1"), END)) as server:
        async with RealtimeClient(server.origin, TOKEN) as client:
            chunks = client.read("run_1")
            assert await anext(chunks) == 0
            with anyio.move_on_after(0.01) as scope:
                await anext(chunks)
            assert scope.cancelled_caught
            assert await anyio.to_thread.run_sync(server.disconnected.wait, 10)
            assert [item async for item in chunks] == [1]
    assert server.positions == [None, "0"]


@pytest.mark.anyio
async def test_a_subscription_that_is_closed_ends() -> None:
    with ScriptedServer(stream(chunk(0), chunk(1)) + HOLD) as server:
        async with RealtimeClient(server.origin, TOKEN) as client:
            async with client.read("run_1") as chunks:
                assert await anext(chunks) == 0
            assert await anyio.to_thread.run_sync(server.disconnected.wait, 10)
            assert [item async for item in chunks] == []
            assert TOKEN not in repr(client) + repr(chunks)


# Closing while another task or thread reads

PAUSED = answer(503, retry_after="60")


async def wait_until_reading(server: ScriptedServer, response: bytes, chunks: Any, got: list[Any]) -> None:
    """Until the reader has got as far as the response allows."""
    if response is PAUSED:
        await until(lambda: chunks._protocol.pause_s)
    elif b"id: 0" in response:
        await until(lambda: got == [0])
    else:  # the head of the response never comes
        assert await anyio.to_thread.run_sync(server.was_requested.wait, 10)


@pytest.mark.anyio
@pytest.mark.parametrize("close_client", [True, False], ids=["client", "subscription"])
@pytest.mark.parametrize("response", [stream(chunk(0)) + HOLD, HOLD, PAUSED], ids=["stream", "silence", "pause"])
async def test_another_task_can_close_what_is_being_read(close_client: bool, response: bytes) -> None:
    """The reader, or the closing task, got a connection error, and the connection stayed open."""
    with ScriptedServer(response) as server:
        client = RealtimeClient(server.origin, TOKEN)
        chunks = client.read("run_1")
        got: list[Any] = []

        async def follow() -> None:
            async for item in chunks:
                got.append(item)  # noqa: PERF401 - checked concurrently
            got.append("ended")

        async with anyio.create_task_group() as group:
            group.start_soon(follow)
            await wait_until_reading(server, response, chunks, got)
            with anyio.fail_after(10):
                await (client if close_client else chunks).aclose()
        if response.endswith(HOLD):
            assert await anyio.to_thread.run_sync(server.disconnected.wait, 10)
        await client.aclose()
    assert got == ([0, "ended"] if b"id: 0" in response else ["ended"])


@pytest.mark.anyio
@pytest.mark.parametrize("close_client", [True, False], ids=["client", "subscription"])
@pytest.mark.parametrize("response", [stream(chunk(0)) + HOLD, HOLD, PAUSED], ids=["stream", "silence", "pause"])
async def test_another_thread_can_close_what_is_being_read(close_client: bool, response: bytes) -> None:
    """The reader did not wake up until the next heartbeat, the end of its pause, or the head of the response."""
    with ScriptedServer(response) as server:
        client = SyncRealtimeClient(server.origin, TOKEN)
        chunks = client.read("run_1")
        got: list[Any] = []

        def follow() -> None:
            for item in chunks:
                got.append(item)  # noqa: PERF402 - checked concurrently
            got.append("ended")

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        await wait_until_reading(server, response, chunks._subscription, got)
        await anyio.to_thread.run_sync((client if close_client else chunks).close)
        await anyio.to_thread.run_sync(thread.join, 10)  # the pause and the silence would last longer
        assert not thread.is_alive()
        if response.endswith(HOLD):
            assert await anyio.to_thread.run_sync(server.disconnected.wait, 10)
        client.close()
    assert got == ([0, "ended"] if b"id: 0" in response else ["ended"])
