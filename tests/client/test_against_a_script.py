"""How the clients handle every response that a server, or a proxy in front of it, can send."""

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
from tests.client.reading import FakeTime, Outcome, read, spread
from tests.client.scripted import END, HOLD, ScriptedServer, answer, chunk, refused, stream
from tests.inprocess import GUARD_S, until

TOKEN = "aaa.bbb.ccc"


@pytest.fixture
def fake_time() -> FakeTime:
    return FakeTime()


def read_stream(kind: str, server: ScriptedServer, fake_time: FakeTime, token: Any = TOKEN, **options: Any) -> Outcome:
    return read(kind, server.origin, token, lambda client: client.read("run_1"), fake_time=fake_time, **options)


def test_a_request_follows_the_protocol(kind: str, fake_time: FakeTime) -> None:
    with ScriptedServer(stream(END)) as server:
        outcome = read(
            kind,
            f"{server.origin}/realtime/",
            TOKEN,
            lambda client: client.read("run 1", "a%b", start_index=7),
            fake_time=fake_time,
        )
        assert (outcome.items, outcome.errors) == ([], [])
    (request,) = server.requests
    assert request.line == "GET /realtime/v1/streams/run%201/a%25b HTTP/1.1"
    assert request.headers["accept"] == "text/event-stream"
    assert request.headers["authorization"] == f"Bearer {TOKEN}"
    assert request.headers["last-event-id"] == "6"
    assert TOKEN not in request.line


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
def test_feeds_use_the_paths_of_the_protocol(kind: str, call: Any, path: str) -> None:
    with ScriptedServer(stream(END)) as server:
        read(kind, server.origin, TOKEN, call)
    assert [request.line for request in server.requests] == [f"GET {path} HTTP/1.1"]


def test_a_body_without_an_end_event_is_resumed(kind: str, fake_time: FakeTime) -> None:
    answers = [stream(chunk(0, '"a"'), chunk(1, '"b"'), "id: 2\ndata: no"), stream(), stream(chunk(2, '"c"'), END)]
    answers[0] = answers[0].removesuffix(b"\n\n")  # an event without its empty line does not count
    with ScriptedServer(*answers) as server:
        outcome = read_stream(kind, server, fake_time)
    assert (outcome.items, outcome.errors) == (["a", "b", "c"], [])
    assert server.positions == [None, "1", "1"]


def test_pauses_grow_and_start_over_after_progress(kind: str, fake_time: FakeTime) -> None:
    unavailable = answer(503)
    with ScriptedServer(*[unavailable] * 3, stream(chunk(0)), unavailable, stream(END)) as server:
        outcome = read_stream(kind, server, fake_time)
    assert (outcome.items, outcome.errors) == ([0], [])
    assert fake_time.pauses == [1, 2, 4, 1, 2]


def test_pauses_are_jittered_and_limited(kind: str, fake_time: FakeTime) -> None:
    fake_time.random = 0.0
    with ScriptedServer(*[answer(500)] * 9, stream(END)) as server:
        assert read_stream(kind, server, fake_time).errors == []
    assert fake_time.pauses == [0.5, 1, 2, 4, 8, 15, 15, 15, 15]


def test_the_retry_field_of_the_server_sets_the_first_pause(kind: str, fake_time: FakeTime) -> None:
    with ScriptedServer(stream("retry: 3000"), answer(502), stream("retry: 0"), stream(END)) as server:
        assert read_stream(kind, server, fake_time).errors == []
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
def test_retry_after_is_honored(fake_time: FakeTime, headers: dict[str, str], pause: int, status: int) -> None:
    with ScriptedServer(answer(status, b"", **headers), stream(END)) as server:
        assert read_stream("sync", server, fake_time, give_up_after=None).errors == []
    assert fake_time.pauses == [pause]


def test_a_reconnect_event_sets_the_pause(kind: str, fake_time: FakeTime) -> None:
    with ScriptedServer(
        stream(chunk(0), 'event: reconnect\nretry: 1234\ndata: {"retry":1234}'), stream(chunk(1), END)
    ) as server:
        outcome = read_stream(kind, server, fake_time)
    assert outcome.items == [0, 0]
    assert server.positions == [None, "0"]
    assert fake_time.pauses == [1.234]


def test_the_client_gives_up_on_a_server_that_stays_unavailable(kind: str, fake_time: FakeTime) -> None:
    with ScriptedServer(stream(chunk(0)), answer(503)) as server:
        outcome = read_stream(kind, server, fake_time, give_up_after=20, retries=1)
    assert outcome.items == [0]
    assert [type(error) for error in outcome.errors] == [ServerUnreachable, ServerUnreachable]
    assert str(outcome.error) == "gave up on /v1/streams/run_1/default: the server responded with 503"
    assert fake_time.pauses == [1, 2, 4, 8, 5, 1, 2, 4, 8, 5]
    assert set(server.positions[1:]) == {"0"}


def test_a_refused_connection_is_retried(kind: str, fake_time: FakeTime) -> None:
    with ScriptedServer(stream(END)) as server:
        pass
    outcome = read_stream(kind, server, fake_time, give_up_after=10)
    assert isinstance(outcome.error, ServerUnreachable)
    assert "ConnectError" in str(outcome.error)
    assert outcome.error.__cause__ is not None


@pytest.mark.slow
def test_a_silent_connection_is_lost(kind: str, fake_time: FakeTime) -> None:
    with ScriptedServer(stream(chunk(0)) + HOLD, stream(chunk(1), END)) as server:
        outcome = read_stream(kind, server, fake_time, silence_timeout=0.2)
        assert server.disconnected.wait(GUARD_S)
    assert (outcome.items, outcome.errors) == ([0, 0], [])
    assert server.positions == [None, "0"]


def test_a_204_ends_the_subscription(kind: str, fake_time: FakeTime) -> None:
    with ScriptedServer(answer(204)) as server:
        outcome = read(kind, server.origin, TOKEN, lambda client: client.read("run_1", start_index=9))
    assert (outcome.items, outcome.errors, server.positions) == ([], [], ["8"])


@pytest.mark.parametrize(
    ("kind", "data", "error", "message"),
    spread(
        [
            ('{"reason":"failed","error":"no luck"}', RunFailed, "the run ended failed: no luck"),
            ('{"reason":"crashed"}', RunFailed, "the run ended crashed"),
            ('{"reason":"lost"}', RunFailed, "the run ended lost"),
            ('{"reason":"invented later"}', RunFailed, "the run ended invented later"),
            ('{"reason":"canceled"}', RunCanceled, "the run was canceled"),
        ]
    ),
)
def test_a_stream_raises_how_its_run_ended(kind: str, data: str, error: type[RunEnded], message: str) -> None:
    with ScriptedServer(stream(chunk(0), f"event: end\nid: 1\ndata: {data}")) as server:
        outcome = read(kind, server.origin, TOKEN, lambda client: client.read("run_1"), retries=1)
    assert outcome.items == [0]
    (raised,) = outcome.errors  # after the error it has ended
    assert type(raised) is error
    assert str(raised) == message
    assert len(server.requests) == 1


def test_a_gap_is_raised_once_before_the_retained_chunks(kind: str, fake_time: FakeTime) -> None:
    gap = 'event: gap\nid: 14\ndata: {"requested":0,"first":15}'
    with ScriptedServer(stream(gap), stream(chunk(15, '"a"'), END)) as server:
        outcome = read_stream(kind, server, fake_time, retries=1)
    assert outcome.items == ["a"]
    (raised,) = outcome.errors
    assert isinstance(raised, StreamGap)
    assert (raised.requested, raised.first) == (0, 15)
    assert server.positions == [None, "14"]


def test_chunks_can_be_read_with_their_index(kind: str) -> None:
    with ScriptedServer(stream(chunk(3, '{"a":1}'), END)) as server:
        outcome = read(kind, server.origin, TOKEN, lambda client: client.read_indexed("run_1", "rows", start_index=3))
    assert outcome.items == [StreamChunk("rows", 3, {"a": 1})]


def test_a_long_event_arrives_complete(kind: str) -> None:
    text = "x" * (1024 * 1024)
    with ScriptedServer(stream(chunk(0, f'"{text}"'), END)) as server:
        outcome = read(kind, server.origin, TOKEN, lambda client: client.read("run_1"))
    assert outcome.items == [text]


def test_get_run_without_a_state_is_unexpected() -> None:
    with ScriptedServer(stream(END)) as server, SyncRealtimeClient(server.origin, TOKEN) as client:
        with pytest.raises(UnexpectedAnswer, match="the server sent no state of the run"):
            client.get_run("run_1")


# Refusals


@pytest.mark.parametrize(
    ("kind", "status", "code", "error"),
    spread(
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
        ]
    ),
)
def test_a_refusal_is_raised_at_once(
    kind: str, fake_time: FakeTime, status: int, code: str, error: type[RealtimeError]
) -> None:
    with ScriptedServer(refused(status, code, "details")) as server:
        outcome = read_stream(kind, server, fake_time)
    assert type(outcome.error) is error
    assert "details" in str(outcome.error)
    assert (outcome.error.status, outcome.error.code) == (status, code)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("kind", "response", "status", "message"),
    spread(
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
        ]
    ),
)
def test_a_foreign_response_is_unexpected(kind: str, response: bytes, status: int, message: str) -> None:
    with ScriptedServer(response) as server:
        error = read(kind, server.origin, TOKEN, lambda client: client.read("run_1")).error
    assert isinstance(error, UnexpectedAnswer)
    assert error.status == status
    assert message in str(error)


def test_a_401_from_a_proxy_is_an_invalid_token(kind: str, fake_time: FakeTime) -> None:
    with ScriptedServer(answer(401, b"x" * 100_000)) as server:
        error = read_stream(kind, server, fake_time).error
    assert type(error) is InvalidToken
    assert len(str(error)) < 200


def test_redirects_are_not_followed(kind: str, fake_time: FakeTime) -> None:
    with ScriptedServer(stream(END)) as other, ScriptedServer(answer(307, location=f"{other.origin}/?x=y")) as server:
        error = read_stream(kind, server, fake_time, follow_redirects=True).error
    assert isinstance(error, UnexpectedAnswer)
    assert f"a redirect to '{other.origin}/', which is not followed" in str(error)
    assert other.requests == []


# Tokens


class Tokens:
    """A token function that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        return f"token-{self.calls}"

    async def later(self) -> str:
        await anyio.lowlevel.checkpoint()
        return self()


EXPIRED = 'event: end\ndata: {"reason":"token_expired"}'


@pytest.fixture
def function(kind: str) -> Any:
    """A token function, async for one of the kinds."""
    tokens = Tokens()
    return tokens.later if kind == "asyncio" else tokens


@pytest.mark.parametrize(
    "answers",
    [[stream(chunk(0), EXPIRED)], [stream(chunk(0)), refused(401, "token_expired", "it has expired")]],
    ids=["event", "status"],
)
def test_an_expired_token_is_renewed(kind: str, fake_time: FakeTime, function: Any, answers: list[bytes]) -> None:
    with ScriptedServer(*answers, stream(chunk(1), END)) as server:
        outcome = read_stream(kind, server, fake_time, function)
    assert (outcome.items, outcome.errors) == ([0, 0], [])
    assert server.tokens == ["token-1"] * len(answers) + ["token-2"]
    assert server.positions[-1] == "0"


def test_a_token_is_reused_while_the_server_accepts_it(kind: str, fake_time: FakeTime, function: Any) -> None:
    with ScriptedServer(stream(chunk(0)), answer(503), stream(END)) as server:
        read_stream(kind, server, fake_time, function)
    assert server.tokens == ["token-1"] * 3


def test_the_refusal_of_a_new_token_is_raised(kind: str, fake_time: FakeTime, function: Any) -> None:
    with ScriptedServer(refused(401, "invalid_token", "no such key")) as server:
        outcome = read_stream(kind, server, fake_time, function, retries=1)
    assert [str(error) for error in outcome.errors] == ["no such key", "no such key"]
    assert [type(error) for error in outcome.errors] == [InvalidToken, InvalidToken]
    assert server.tokens == ["token-1", "token-2", "token-3", "token-4"]


def test_a_token_with_too_narrow_scopes_is_renewed(kind: str, fake_time: FakeTime, function: Any) -> None:
    """The function may create tokens for the current runs of a user."""
    with ScriptedServer(refused(403, "forbidden", "not this run"), stream(chunk(0), END)) as server:
        outcome = read_stream(kind, server, fake_time, function)
    assert (outcome.items, outcome.errors) == ([0], [])
    assert server.tokens == ["token-1", "token-2"]


def test_a_new_token_with_too_narrow_scopes_is_an_error(kind: str, fake_time: FakeTime, function: Any) -> None:
    with ScriptedServer(refused(403, "forbidden", "not this run")) as server:
        error = read_stream(kind, server, fake_time, function).error
    assert type(error) is ScopeDenied
    assert server.tokens == ["token-1", "token-2"]


def test_each_token_that_made_progress_is_renewed(kind: str, fake_time: FakeTime, function: Any) -> None:
    answers = [stream(chunk(index), EXPIRED) for index in range(4)]
    with ScriptedServer(*answers, stream(END)) as server:
        outcome = read_stream(kind, server, fake_time, function)
    assert (outcome.items, outcome.errors) == ([0] * 4, [])
    assert server.tokens == [f"token-{number}" for number in range(1, 6)]
    assert fake_time.pauses == []


@pytest.mark.parametrize("response", [stream(EXPIRED), refused(401, "token_expired", "the token has expired")])
def test_the_expiry_of_a_fixed_token_is_raised(kind: str, fake_time: FakeTime, response: bytes) -> None:
    with ScriptedServer(response) as server:
        error = read_stream(kind, server, fake_time).error
    assert type(error) is ExpiredToken
    assert len(server.requests) == 1


def test_an_error_of_the_token_function_is_raised(kind: str, fake_time: FakeTime) -> None:
    def broken() -> str:
        raise LookupError("no session")

    with ScriptedServer(stream(END)) as server:
        outcome = read_stream(kind, server, fake_time, broken)
    assert isinstance(outcome.error, LookupError)
    assert server.requests == []


@pytest.mark.parametrize(("kind", "token"), spread([[""], ["a\r\nb"], ["ä"], ["a b"], [None], [5]]))
def test_a_function_that_returns_no_token_is_an_error(kind: str, fake_time: FakeTime, token: Any) -> None:
    with ScriptedServer(stream(END)) as server:
        error = read_stream(kind, server, fake_time, lambda: token).error
    assert isinstance(error, InvalidToken)
    assert server.requests == []


def test_the_sync_client_refuses_an_async_function(fake_time: FakeTime) -> None:
    with ScriptedServer(stream(END)) as server:
        error = read_stream("sync", server, fake_time, Tokens().later).error
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
    assert tokens.calls == 1
    assert server.tokens == ["token-1"] * 5


def test_no_token_is_shown(kind: str, fake_time: FakeTime, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for name in ("httpcore", "httpx"):
        caplog.set_level(logging.DEBUG, logger=name)
    with ScriptedServer(answer(503), refused(401, "invalid_token", "no")) as server:
        error = read_stream(kind, server, fake_time).error
    assert TOKEN not in caplog.text
    assert "/v1/streams/run_1/default: the server responded with 503; next attempt in 1.0 s" in caplog.text
    assert TOKEN not in repr(error)


# Interrupting


@pytest.mark.anyio
async def test_a_pause_continues_where_a_timeout_interrupted_it() -> None:
    with ScriptedServer(answer(503), stream(chunk(0), END)) as server:
        async with RealtimeClient(server.origin, TOKEN) as client:
            pauses: list[float] = []
            now = 0.0

            async def sleep(seconds: float) -> None:
                nonlocal now
                pauses.append(seconds)
                now += 0.75
                if seconds > 0.75:
                    interrupted.cancel()
                await anyio.lowlevel.checkpoint()

            transport = client._transport
            transport.sleep, transport.clock, transport.random = sleep, lambda: now, lambda: 1.0
            chunks = client.read("run_1")
            with anyio.CancelScope() as interrupted:
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
async def test_a_closed_subscription_ends() -> None:
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
            with anyio.fail_after(GUARD_S):
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
