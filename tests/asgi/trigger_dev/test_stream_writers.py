from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel
import pytest

from asgi_realtime import Limits, Realtime, Timeouts
from asgi_realtime.asgi import open_request
from asgi_realtime.asgi.app import RealtimeApp
from asgi_realtime.asgi.host import Message, Scope
from asgi_realtime.brokers.base import Broker, StreamKey
from asgi_realtime.core.chunks import decode
from asgi_realtime.core.errors import ServerShutdown
from asgi_realtime.core.log import End
from asgi_realtime.streams.outbox import CALL_BYTES, CALL_ITEMS
from asgi_realtime.testing import AsgiClient
from asgi_realtime.testing.driver import make_scope
from tests.asgi.fake_host import SECRET as FAKE_HOST_SECRET
from tests.asgi.fake_host import FakeHost
from tests.asgi.official_sdk import on_one_loop
from tests.faults import RemoteBroker, until
from tests.inprocess import GUARD_S, SECRET, make_realtime

pytestmark = pytest.mark.anyio

PATH = "/v1/streams/run_1/self/default"
APPEND = f"{PATH}/append"
INPUT = "/v1/streams/run_1/input/approval"
KEY = StreamKey("run_1", "default")


Host = FakeHost | Realtime


def headers(host: Host, **more: str) -> dict[str, str]:
    """The headers of the official client in a worker: the secret key, and `client_id` as `X-Client-Id` and so on."""
    secret = FAKE_HOST_SECRET if isinstance(host, FakeHost) else SECRET
    given = {f"x-{name.replace('_', '-')}": value for name, value in more.items()}
    return {"authorization": f"Bearer {secret}", "content-type": "application/json", **given}


async def send(host: Host, method: str, path: str = PATH, body: bytes = b"", **more: str) -> tuple[int, Any]:
    """Send a complete request; returns the status and the JSON."""
    response = await AsgiClient(host).request(method, path, headers=headers(host, **more), body=body)
    return response.status_code, json.loads(response.body) if response.body else None


async def stored(broker: Broker, key: StreamKey = KEY) -> list[bytes]:
    return [entry.data for entry in (await broker.read(key, limit=10_000)).entries]


class Upload:
    """A request with a body that is sent part by part."""

    def __init__(self) -> None:
        self.status = 0
        self.answer: Any = None
        self.headers: dict[str, str] = {}
        self.answered = anyio.Event()
        self._parts_in, self._parts = anyio.create_memory_object_stream[Message](0)

    async def part(self, body: bytes) -> None:
        """Send a part of the body. Returns once the app has received it."""
        await self._message({"type": "http.request", "body": body, "more_body": True})

    async def end(self, body: bytes = b"") -> int:
        """Send the last part, if the app still reads, and wait for the response; returns its status."""
        with suppress(anyio.BrokenResourceError):
            await self._message({"type": "http.request", "body": body, "more_body": False})
        await self.answered.wait()
        return self.status

    async def cut(self) -> None:
        """Close the connection, and wait until the app has returned."""
        await self._message({"type": "http.disconnect"})
        await self.answered.wait()

    async def _message(self, message: Message) -> None:
        with anyio.fail_after(GUARD_S):
            await self._parts_in.send(message)

    async def run(self, app: Host, scope: Scope) -> None:
        body = b""

        async def respond(message: Message) -> None:
            nonlocal body
            if message["type"] == "http.response.start":
                self.status = message["status"]
                self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            else:
                body += message.get("body", b"")

        with self._parts:
            await app(scope, self._parts.receive, respond)
        self.answer = json.loads(body) if body else None
        self.answered.set()


@asynccontextmanager
async def upload(host: Host, path: str = PATH, method: str = "POST", **more: str) -> AsyncIterator[Upload]:
    """A request with a body that the block sends. The app must have responded when the block ends."""
    opened = Upload()
    scope = make_scope(method, path, headers=headers(host, **more))
    with anyio.fail_after(GUARD_S):
        async with anyio.create_task_group() as group, opened._parts_in:
            group.start_soon(opened.run, host, scope)
            yield opened


async def has(broker: Broker, count: int, key: StreamKey = KEY) -> list[bytes]:
    """Wait until a stream has this many chunks."""
    with anyio.fail_after(GUARD_S):
        while len(found := await stored(broker, key)) < count:
            await anyio.lowlevel.checkpoint()
    return found


@asynccontextmanager
async def started(**options: Any) -> AsyncIterator[tuple[Realtime, RemoteBroker, str]]:
    """A real `Realtime` with a broker that suspends in every call, and the id of an open run."""
    broker = RemoteBroker()
    async with make_realtime(broker=broker, **options) as realtime, realtime.open_run("chat") as run:
        try:
            yield realtime, broker, run.id
        finally:
            broker.away = set()


def path_of(run_id: str, key: str = "default", target: str = "self") -> str:
    return f"/v1/streams/{run_id}/{target}/{key}"


# Create a stream


async def test_a_stream_is_listed_before_it_is_written(host: FakeHost) -> None:
    await host.create()
    for _ in range(2):
        response = await AsgiClient(host).request("PUT", PATH, headers=headers(host), body=b"whatever")
        assert (response.status_code, response.body) == (202, b'{"version":"v1"}')
        assert not [name for name in response.headers if name.startswith("x-s2")], "the client would write elsewhere"
        assert response.headers["content-type"] == "application/json"
    assert (await host.get("run_1")).streams == ("default",)


async def test_a_stream_needs_a_run_that_is_not_over(host: FakeHost) -> None:
    assert (await send(host, "PUT"))[0] == 404
    await host.create()
    await host.finish()
    status, answer = await send(host, "PUT")
    assert (status, answer["code"]) == (400, "invalid_request")
    assert "'run_1' is over (COMPLETED)" in answer["error"]


async def test_the_number_of_streams_of_a_run_is_limited() -> None:
    async with make_realtime(limits=Limits(streams_per_run=2)) as realtime, realtime.open_run("chat") as run:
        for key in "ab":
            assert (await send(realtime, "PUT", path_of(run.id, key)))[0] == 202
        for method, path in (("PUT", ""), ("POST", ""), ("POST", "/append")):
            status, answer = await send(realtime, method, path_of(run.id, "c") + path, b"1")
            assert status == 422
            assert "limit 2" in answer["error"]
        assert (await send(realtime, "POST", path_of(run.id, "a"), b"1"))[0] == 200


# Authorization, keys and targets

WRITES = [("PUT", PATH), ("POST", PATH), ("HEAD", PATH), ("POST", APPEND)]


@on_one_loop
@pytest.mark.parametrize(("method", "path"), WRITES)
async def test_writing_needs_the_secret_key(host: FakeHost, method: str, path: str) -> None:
    await host.create()
    public = host.headers("admin", "write:all", "write:inputStreams:run_1")
    for given, status, code in (
        ({}, 401, "invalid_token"),
        ({"authorization": "Bearer nonsense"}, 401, "invalid_token"),
        (public, 403, "forbidden"),
    ):
        response = await AsgiClient(host).request(method, path, headers={**given, "x-client-id": "c"}, body=b"1")
        assert response.status_code == status
        if method != "HEAD":
            assert json.loads(response.body)["code"] == code
        if status == 403 and method != "HEAD":
            assert "secret key" in json.loads(response.body)["error"]
    secret_in_query = await AsgiClient(host).request(method, path, query={"access_token": FAKE_HOST_SECRET}, body=b"1")
    assert secret_in_query.status_code == 401
    assert (await host.get("run_1")).streams == ()


@on_one_loop
@pytest.mark.parametrize(("method", "path"), WRITES)
async def test_an_invalid_key_is_422(host: FakeHost, method: str, path: str) -> None:
    await host.create()
    for key in ("$default", "$trigger.input:approval", "k" * 129, "a\\b", "a\rb"):
        status, _ = await send(host, method, path.replace("default", key), b"1", client_id="c")
        assert status == 422, key
    run = await host.get("run_1")
    assert (run.streams, run.inputs) == ((), ())


@pytest.mark.parametrize(("method", "path"), WRITES)
async def test_the_target_is_the_run_its_parent_or_its_root(method: str, path: str) -> None:
    async with make_realtime() as realtime:
        run_ids: dict[str, str] = {}

        @realtime.task("deep")
        async def deep(depth: int, run: Any) -> None:
            run_ids[str(depth)] = run.id
            if depth < 2:
                await (await realtime.trigger(deep, depth + 1)).result()
            else:
                for target in ("self", "parent", "root"):
                    written = path.replace("run_1/self/default", f"{run.id}/{target}/{target}")
                    assert (await send(realtime, method, written, b"1", client_id="c"))[0] in (200, 202)

        await (await realtime.trigger(deep, 0)).result()
        records = [(await realtime.get_run(run_ids[depth])) for depth in "012"]
        known = ["", "", ""] if method == "HEAD" else ["root", "parent", "self"]
        assert ["".join(record.streams) for record in records] == known


@on_one_loop
@pytest.mark.parametrize(("method", "path"), WRITES)
async def test_a_run_without_a_parent_is_its_own_root(host: FakeHost, method: str, path: str) -> None:
    await host.create()
    assert (await send(host, method, path.replace("self", "root"), b"1", client_id="c"))[0] in (200, 202)
    status, answer = await send(host, method, path.replace("self", "parent"), b"1", client_id="c")
    assert status == 400
    assert answer is None or "'run_1' has no parent" in answer["error"]
    status, answer = await send(host, method, path.replace("self", "child"), b"1", client_id="c")
    assert status == 400
    assert answer is None or "'child'; allowed are self, parent, root" in answer["error"]


async def test_other_methods_are_405(host: FakeHost) -> None:
    response = await AsgiClient(host).get(PATH, headers=headers(host))
    assert (response.status_code, response.headers["allow"]) == (405, "PUT, POST, HEAD")


# Write


async def test_chunks_are_readable_while_the_request_is_open(host: FakeHost) -> None:
    await host.create()
    async with (
        upload(host, client_id="c1") as writer,
        AsgiClient(host).stream("/v1/streams/run_1/default", headers=host.headers()) as reader,
    ):
        await reader.chunk()
        await writer.part(b'{"token": "a"}\n"b')
        assert [event.data for event in await reader.read_events()] == ['{"token": "a"}']
        await writer.part(b'"\n3\n')
        assert [event.data for event in await reader.read_events()] == ['"b"', "3"]
        assert await writer.end() == 200
        assert writer.answer == {"ok": True}
        assert (await host.get("run_1")).streams == ("default",)
        await writer.answered.wait()
        await host.finish()
        assert [event.event for event in await reader.read_all_events()] == ["end"]


BODY = '{"a": 1}\n"ü🙂"\r\n[1,\r 2]\n\nundefined\n"\\ud800"\n0.10000000000000000555'.encode()
CHUNKS = [b'{"a": 1}', '"ü🙂"'.encode(), b"[1,  2]", b"null", b'"\\ud800"', b"0.10000000000000000555"]


@on_one_loop
@pytest.mark.parametrize("end", [b"", b"\n"])
async def test_a_body_can_be_split_anywhere(host: FakeHost, end: bytes) -> None:
    body = BODY + end
    for place in range(len(body) + 1):
        run_id = f"run_{place}"
        await host.create(run_id)
        async with upload(host, path_of(run_id), client_id="c") as writer:
            await writer.part(body[:place])
            assert await writer.end(body[place:]) == 200
        assert await stored(host.broker, StreamKey(run_id, "default")) == CHUNKS
        assert (await head(host, run_id))[1] == str(len(CHUNKS) - 1), "every line except blank ones has an index"


async def test_a_body_can_arrive_byte_by_byte(host: FakeHost) -> None:
    await host.create()
    async with upload(host) as writer:
        for place in range(len(BODY)):
            await writer.part(BODY[place : place + 1])
        assert await writer.end() == 200
    assert await stored(host.broker) == CHUNKS


async def test_the_lines_of_a_part_are_appended_together_before_more_is_read() -> None:
    async with started() as (realtime, broker, run_id), upload(realtime, path_of(run_id)) as writer:
        broker.hold = anyio.Event()
        await writer.part(b"1\n2\n3\n4")
        with anyio.move_on_after(0.01) as waited:
            await writer.part(b"5\n")
        assert waited.cancelled_caught, "a part was read before the previous one was stored"
        broker.hold.set()
        assert await writer.end(b"5\n6\n") == 200
        assert broker.appends == [3, 2]


async def test_a_large_part_is_appended_in_several_calls() -> None:
    async with started() as (realtime, broker, run_id), upload(realtime, path_of(run_id)) as writer:
        await writer.part(b"1\n" * (2 * CALL_ITEMS + 3))
        assert await writer.end((b'"' + b"x" * (CALL_BYTES // 2) + b'"\n') * 3) == 200
        assert broker.appends == [CALL_ITEMS, CALL_ITEMS, 3, 2, 1]


async def test_a_large_body_does_not_starve_other_tasks(host: FakeHost) -> None:
    await host.create()
    sizes: list[int] = []

    async def observe() -> None:
        while True:
            sizes.append((await host.broker.read(KEY, limit=1)).next)
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as group, upload(host) as writer:
        group.start_soon(observe)
        assert await writer.end(b"1\n" * (4 * CALL_ITEMS)) == 200
        group.cancel_scope.cancel()
    assert set(sizes) & {CALL_ITEMS, 2 * CALL_ITEMS, 3 * CALL_ITEMS}, "no other task ran in between"


# Resume


async def head(host: Host, run_id: str = "run_1", client_id: str = "c") -> tuple[int, str | None]:
    response = await AsgiClient(host).request("HEAD", path_of(run_id), headers=headers(host, client_id=client_id))
    assert response.status_code != 200 or response.body == b""
    return response.status_code, response.headers.get("x-last-chunk-index")


async def test_a_writer_asks_where_to_resume(host: FakeHost) -> None:
    assert (await head(host))[0] == 404
    await host.create()
    assert await head(host) == (200, "-1")
    assert (await host.get("run_1")).streams == (), "asking does not create the stream"
    await send(host, "POST", body=b"1\n2\n3\n", client_id="c")
    await send(host, "POST", body=b"4\n", client_id="d")
    assert (await head(host), await head(host, client_id="d")) == ((200, "2"), (200, "0"))
    await host.finish()
    assert await head(host) == (200, "2")
    assert (await send(host, "HEAD"))[0] == 400, "X-Client-Id is missing"


@on_one_loop
async def test_an_incomplete_line_is_dropped_and_sent_again(host: FakeHost) -> None:
    await host.create()
    lines = [b'"chunk %d"' % number for number in range(4)]
    body = b"\n".join(lines) + b"\n"
    for place in range(len(body) + 1):
        client_id = f"c{place}"
        async with upload(host, client_id=client_id) as writer:
            await writer.part(body[:place])
            await writer.cut()
        assert (writer.status, writer.answer["code"]) == (408, "cut_off"), "the client retries this status"
        status, last = await head(host, client_id=client_id)
        assert (status, last) == (200, str(body[:place].count(b"\n") - 1))
        rest = b"".join(line + b"\n" for line in lines[int(last or "") + 1 :])
        resume = str(int(last or "") + 1)
        assert (await send(host, "POST", body=rest, client_id=client_id, resume_from_chunk=resume))[0] == 200
    assert await stored(host.broker) == lines * (len(body) + 1)


async def test_stored_lines_are_skipped(host: FakeHost) -> None:
    await host.create()
    body = b"0\n1\n2\n3\n4\n"
    await send(host, "POST", body=body[:6], client_id="c")
    assert (await send(host, "POST", body=body, client_id="c"))[0] == 200
    assert (await send(host, "POST", body=body[4:], client_id="c", resume_from_chunk="2"))[0] == 200
    assert (await send(host, "POST", body=b"", client_id="c", resume_from_chunk="5"))[0] == 200
    assert await stored(host.broker) == [b"0", b"1", b"2", b"3", b"4"]


async def test_a_writer_that_leaves_a_gap_is_sent_back(host: FakeHost) -> None:
    """A final status would end the writer. After this one the client asks where to resume and sends what is missing."""
    await host.create()
    await send(host, "POST", body=b"0\n1\n", client_id="c")
    status, answer = await send(host, "POST", body=b"5\n", client_id="c", resume_from_chunk="5")
    assert (status, answer["code"]) == (503, "producer_gap")
    assert "chunk 5" in answer["error"] and "2 are stored" in answer["error"]
    assert await head(host) == (200, "1")
    assert await stored(host.broker) == [b"0", b"1"]


async def test_writers_of_one_stream_interleave(host: FakeHost) -> None:
    await host.create()
    async with upload(host, client_id="a") as one, upload(host, client_id="b") as other, upload(host) as unnamed:
        for number in range(3):
            for name, writer in (("a", one), ("b", other), ("n", unnamed)):
                await writer.part(f'"{name}{number}"\n'.encode())
                await has(host.broker, number * 3 + "abn".index(name) + 1)
        assert await one.end() == 200
        assert await other.end(b'"last"') == 200
        assert await unnamed.end(b'"very last"') == 200
    expected = [f'"{name}{number}"'.encode() for number in range(3) for name in "abn"]
    assert await stored(host.broker) == [*expected, b'"last"', b'"very last"']
    assert (await head(host, client_id="a"), await head(host, client_id="b")) == ((200, "2"), (200, "3"))


async def test_each_request_without_a_client_id_is_a_new_writer(host: FakeHost) -> None:
    await host.create()
    for _ in range(2):
        assert (await send(host, "POST", body=b"1\n2"))[0] == 200
    assert await stored(host.broker) == [b"1", b"2"] * 2
    status, answer = await send(host, "POST", body=b"1", resume_from_chunk="1")
    assert status == 400
    assert "X-Resume-From-Chunk is 1 without X-Client-Id" in answer["error"]


@on_one_loop
async def test_the_index_to_resume_from_is_a_non_negative_integer(host: FakeHost) -> None:
    await host.create()
    for value in ("-1", "1.5", "x", " ", "+1", "0x1", "1_0", "²", "9" * 16):
        status, answer = await send(host, "POST", body=b"1", client_id="c", resume_from_chunk=value)
        assert status == 400
        assert "X-Resume-From-Chunk" in answer["error"]
    assert (await send(host, "POST", body=b"1", client_id="c", resume_from_chunk=""))[0] == 200


@on_one_loop
@pytest.mark.parametrize(
    ("name", "method", "path"),
    [
        ("client_id", "POST", PATH),
        ("client_id", "HEAD", PATH),
        ("part_id", "POST", APPEND),
        ("trigger_request_idempotency_key", "POST", APPEND),
        ("trigger_request_idempotency_key", "POST", INPUT),
    ],
)
async def test_names_in_headers_are_visible_ascii(host: FakeHost, name: str, method: str, path: str) -> None:
    await host.create()
    for value in ("", " ", "a b", "ü", "a\x00b", "a\x7fb", "c" * 129):
        status, answer = await send(host, method, path, b'{"data": 1}', **{name: value})
        assert status == 400
        assert answer is None or "1 to 128 visible ASCII" in answer["error"]
    assert (await send(host, method, path, b'{"data": 1}', **{name: "c" * 128}))[0] == 200


# Errors


@on_one_loop
@pytest.mark.parametrize(
    ("bad", "end"),
    [
        (b"{", b""),
        (b"{", b"\n"),
        (b"{", b"\n4\n"),
        (b'"a', b""),
        (b"NaN", b"\n"),
        (b"1 2", b"\n4\n"),
        (b"\xff", b""),
        (b"'a'", b"\n"),
        (b"Undefined", b"\n4\n"),
        (b"[" * 5000, b""),
        (b"1e999", b"\n"),
    ],
)
async def test_an_invalid_line_is_named_by_its_index(host: FakeHost, bad: bytes, end: bytes) -> None:
    await host.create()
    async with upload(host, client_id="c", resume_from_chunk="0") as writer:
        await writer.part(b"0\n1\n")
        assert await writer.end(b"2\n" + bad + end) == 400
    assert writer.answer["code"] == "invalid_request"
    assert writer.answer["error"].startswith("chunk 3: ")
    assert "one JSON value" in writer.answer["error"]
    assert await stored(host.broker) == [b"0", b"1", b"2"], "lines before it are stored"
    assert await head(host) == (200, "2")


async def test_the_size_of_a_chunk_is_limited() -> None:
    host = FakeHost(limits=Limits(chunk_bytes=10))
    await host.create()
    fits = b'"12345678"'
    assert (await send(host, "POST", body=fits + b"\r\n" + fits))[0] == 200
    async with upload(host, client_id="c") as writer:
        await writer.part(b"0\n" + fits[:-1] + b"99")  # the line does not end
        await writer.answered.wait()
    assert writer.status == 413
    assert writer.answer["code"] == "limit_exceeded"
    assert "chunk 1: " in writer.answer["error"] and "limit 10" in writer.answer["error"]
    assert await stored(host.broker) == [fits, fits, b"0"]


async def test_at_most_one_line_and_one_part_are_buffered() -> None:
    small = FakeHost(limits=Limits(chunk_bytes=1000))
    await small.create()
    async with upload(small) as writer:
        for _ in range(10):
            await writer.part(b"[" + b" " * 99)
        with anyio.move_on_after(GUARD_S):
            await writer.part(b" ")
        await writer.answered.wait()
    assert writer.status == 413


async def test_a_run_that_is_over_is_400_before_the_body_is_read(host: FakeHost) -> None:
    await host.create()
    await host.finish()
    async with upload(host, client_id="c") as writer:
        await writer.answered.wait()
    assert writer.status == 400
    assert "'run_1' is over (COMPLETED)" in writer.answer["error"]
    assert (await send(host, "POST", path_of("run_2")))[0] == 404


async def test_a_run_that_ends_during_the_request_accepts_no_more_chunks(host: FakeHost) -> None:
    await host.create()
    async with upload(host, client_id="c") as writer:
        await writer.part(b"0\n")
        await has(host.broker, 1)
        await host.finish()
        await writer.part(b"1\n")
        await writer.answered.wait()
    assert writer.status == 400
    assert "accepts no more chunks" in writer.answer["error"]
    assert await stored(host.broker) == [b"0"]


async def test_a_repeat_after_the_end_of_the_run_is_200_if_everything_is_stored(host: FakeHost) -> None:
    """The response to the last request can have been lost before the run ended."""
    await host.create()
    await send(host, "POST", body=b"0\n1\n", client_id="c")
    await host.finish()
    assert (await send(host, "POST", body=b"0\n1\n", client_id="c"))[0] == 200
    assert (await send(host, "POST", body=b"", client_id="c", resume_from_chunk="2"))[0] == 200
    status, answer = await send(host, "POST", body=b"1\n2\n", client_id="c", resume_from_chunk="1")
    assert status == 400
    assert "is over" in answer["error"]
    assert await stored(host.broker) == [b"0", b"1"]


async def test_a_lost_stream_accepts_no_more_chunks(host: FakeHost) -> None:
    await host.create()
    await host.broker.append(KEY, [], end=End("lost"))
    status, answer = await send(host, "POST", body=b"0")
    assert status == 400
    assert "ended (lost)" in answer["error"]


async def test_a_run_that_is_removed_during_the_request_is_404(host: FakeHost) -> None:
    await host.create()
    async with upload(host, client_id="c") as writer:
        await writer.part(b"0\n")
        await has(host.broker, 1)
        await host.finish()
        await host.broker.remove("run_1")
        assert await writer.end(b"1\n") == 404


# Shutdown, silence, limits


async def check_released(host: Host) -> None:
    """Check that no request is open or counted any more."""
    assert not host.subscribers
    app = getattr(host.respond, "__self__", None)
    assert isinstance(app, RealtimeApp)
    counts = app.subscription_limits
    assert (counts.open, counts._by_run, counts._by_owner) == (0, {}, {})


async def test_the_shutdown_ends_an_idle_writer(host: FakeHost) -> None:
    await host.create()
    async with upload(host, client_id="c") as writer, upload(host, client_id="idle") as idle:
        await writer.part(b"0\n1")
        await has(host.broker, 1)
        await until(lambda: len(host.subscribers) == 2)
        host.begin_shutdown()
        await writer.answered.wait()
        await idle.answered.wait()
    assert (writer.status, writer.answer["code"]) == (503, "server_shutdown")
    assert idle.status == 503
    assert await head(host) == (200, "0"), "the incomplete line is not stored"
    await check_released(host)


@pytest.mark.parametrize(("method", "path"), [("PUT", PATH), ("POST", PATH), ("POST", APPEND), ("POST", INPUT)])
async def test_writes_after_the_start_of_the_shutdown_are_503(host: FakeHost, method: str, path: str) -> None:
    await host.create()
    host.begin_shutdown()
    async with upload(host, path, method) as writer:
        await writer.answered.wait()
    assert (writer.status, writer.answer["code"]) == (503, "server_shutdown")
    run = await host.get("run_1")
    assert (run.streams, run.inputs) == ((), ())


async def test_the_shutdown_interrupts_an_append_and_its_count_stays_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_request, "CLOSING_GRACE_S", math.inf)  # a slow machine can take longer to respond to HEAD
    async with started(timeouts=Timeouts(tick=0.01)) as (realtime, broker, run_id):
        key = StreamKey(run_id, "default")
        async with upload(realtime, path_of(run_id), client_id="c") as writer:
            await writer.part(b"0\n")
            await has(broker, 1, key)
            broker.hold = anyio.Event()
            await writer.part(b"1\n2\n")
            await until(lambda: broker.held > 0)
            realtime.begin_shutdown()
            await writer.answered.wait()
        assert writer.status == 503
        broker.hold.set()
        status, last = await head(realtime, run_id)
        assert (status, last) == (200, str(len(await stored(broker, key)) - 1))


async def test_the_shutdown_ends_requests_that_wait_for_the_broker() -> None:
    async with started(timeouts=Timeouts(tick=0.01, append=3600)) as (realtime, broker, run_id):
        requests = [(path_of(run_id), b"0\n"), (path_of(run_id) + "/append", b"0"), (path_of(run_id, "x"), b"0\n")]
        broker.away = {"append", "commit"}
        async with anyio.create_task_group() as group:
            answers: list[int] = []

            async def write(path: str, body: bytes) -> None:
                async with upload(realtime, path) as writer:
                    answers.append(await writer.end(body))

            for path, body in requests:
                group.start_soon(write, path, body)
            await until(lambda: broker.failed >= 6 and len(realtime.subscribers) == 3)
            realtime.begin_shutdown()
        assert answers == [503] * 3
        await check_released(realtime)


async def test_a_stopped_broker_is_reported_as_a_shutdown(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    await host.create()

    async def stopped(*args: Any, **options: Any) -> None:
        raise ServerShutdown()

    monkeypatch.setattr(host.broker, "append", stopped)
    assert (await send(host, "POST", body=b"1"))[0] == 503
    assert (await send(host, "POST", APPEND, b"1"))[0] == 503


async def test_a_silent_writer_is_408(host: FakeHost) -> None:
    await host.create()
    assert host.timeouts.writer == 960
    async with upload(host, client_id="c") as writer:
        await host.wait_for_subscriber()
        host.tick(959)
        host.tick(959)
        await writer.part(b"0\n")
        await has(host.broker, 1)
        host.tick(1)
        host.tick(959)
        assert not writer.answered.is_set()
        host.tick(1)
        await writer.answered.wait()
    assert (writer.status, writer.answer["code"]) == (408, "silent")
    assert "960 s" in writer.answer["error"]
    await check_released(host)


async def test_open_writers_count_as_subscriptions() -> None:
    host = FakeHost(limits=Limits(subscribers=2, subscribers_per_run=1))
    for number in range(1, 4):
        await host.create(f"run_{number}")
    async with upload(host) as one, upload(host, path_of("run_2")) as other:
        await until(lambda: len(host.subscribers) == 2)
        for run_id, limit in (("run_1", "limit 2"), ("run_3", "limit 2")):
            status, answer = await send(host, "POST", path_of(run_id), b"1")
            assert status == 429
            assert limit in answer["error"]
        assert (await send(host, "POST", path_of("run_1") + "/append", b"1"))[0] == 200, "single appends do not count"
        assert await one.end(b"{") == 400
        assert (await send(host, "POST", path_of("run_3"), b"1"))[0] == 200
        status, answer = await send(host, "POST", path_of("run_2"), b"1")
        assert status == 429 and "this run" in answer["error"]
        await other.cut()
    await check_released(host)


async def test_the_host_can_cancel_a_writer(host: FakeHost) -> None:
    await host.create()
    opened = Upload()
    async with opened._parts_in, anyio.create_task_group() as group:
        group.start_soon(opened.run, host, make_scope("POST", PATH, headers=headers(host)))
        await host.wait_for_subscriber()
        group.cancel_scope.cancel()
    assert not opened.answered.is_set()
    await check_released(host)


# Unavailable broker


async def test_a_writer_waits_for_an_unavailable_broker() -> None:
    async with started() as (realtime, broker, run_id), upload(realtime, path_of(run_id), client_id="c") as writer:
        await writer.part(b"0\n")
        await has(broker, 1, StreamKey(run_id, "default"))
        broker.away = {"append"}
        await writer.part(b"1\n2\n")
        await until(lambda: broker.failed >= 2)
        broker.away = set()
        assert await writer.end() == 200
        assert await stored(broker, StreamKey(run_id, "default")) == [b"0", b"1", b"2"]


@pytest.mark.parametrize("call", ["load", "append", "commit"])
async def test_a_broker_that_stays_unavailable_is_503(call: str) -> None:
    timeouts = Timeouts(tick=0.01, drain=0.02, append=0.01)
    async with started(timeouts=timeouts) as (realtime, broker, run_id):
        broker.away = {call}
        for path, body in ((path_of(run_id), b"1\n"), (path_of(run_id) + "/append", b"1")):
            status, answer = await send(realtime, "POST", path, body, client_id="c")
            assert (status, answer["code"]) == (503, "broker_unavailable")
        broker.away = {"produced"}
        assert (await head(realtime, run_id))[0] == 503


@pytest.mark.parametrize("names", [{}, {"client_id": "c"}])
async def test_an_append_is_stored_once_if_its_acknowledgement_is_lost(names: dict[str, str]) -> None:
    async with started() as (realtime, broker, run_id):
        for path, body in ((path_of(run_id), b"1\n2\n"), (path_of(run_id) + "/append", b"3")):
            broker.lose_answers = 1
            assert (await send(realtime, "POST", path, body, **names))[0] == 200
        assert await stored(broker, StreamKey(run_id, "default")) == [b"1", b"2", b'"3"']
        broker.lose_answers = 1
        assert (await send(realtime, "POST", f"/v1/streams/{run_id}/input/in", b'{"data": 1}'))[0] == 200
        assert await stored(broker, StreamKey(run_id, "$trigger.input:in")) == [b"1"]


async def test_a_writer_sends_acknowledged_chunks_again_after_data_loss(host: FakeHost) -> None:
    """After a failover of Redis, the writer is sent back to the last chunk that still exists."""
    await host.create()
    async with upload(host, client_id="c") as writer:
        await writer.part(b"0\n1\n2\n")
        await has(host.broker, 3)
        fresh = FakeHost()
        await fresh.create()
        await send(fresh, "POST", body=b"0\n", client_id="c")
        host.broker = fresh.broker  # a replica without the rest
        await writer.part(b"3\n")
        await writer.answered.wait()
    assert (writer.status, writer.answer["code"]) == (503, "producer_gap")
    _, last = await head(host)
    assert last == "0"
    assert (await send(host, "POST", body=b"1\n2\n3\n", client_id="c", resume_from_chunk="1"))[0] == 200
    assert await stored(host.broker) == [b"0", b"1", b"2", b"3"]


# Append


@on_one_loop
@pytest.mark.parametrize("text", ["plain", "", "two\nlines\r", '{"a": 1}', "ü 🙂 \u2028 \ufeff", "\x00"])
async def test_the_text_of_an_append_is_one_chunk(host: FakeHost, text: str) -> None:
    await host.create()
    assert await send(host, "POST", APPEND, text.encode()) == (200, {"ok": True})
    (data,) = await stored(host.broker)
    assert decode(data) == text
    assert b"\n" not in data and b"\r" not in data
    assert (await host.get("run_1")).streams == ("default",)


@pytest.mark.parametrize(
    "again",
    [
        {"part_id": "p"},
        {"trigger_request_idempotency_key": "k"},
        {"part_id": "p", "trigger_request_idempotency_key": "k"},
    ],
)
async def test_a_retried_append_is_stored_once(host: FakeHost, again: dict[str, str]) -> None:
    await host.create()
    for _ in range(3):
        assert (await send(host, "POST", APPEND, b"1", **again))[0] == 200
    assert (await send(host, "POST", APPEND, b"2", **{name: value + "2" for name, value in again.items()}))[0] == 200
    assert (await send(host, "POST", APPEND.replace("default", "other"), b"3", **again))[0] == 200
    for _ in range(2):
        await send(host, "POST", APPEND, b"4")
    assert await stored(host.broker) == [b'"1"', b'"2"', b'"4"', b'"4"']
    assert await stored(host.broker, StreamKey("run_1", "other")) == [b'"3"']
    await host.finish()
    assert (await send(host, "POST", APPEND, b"1", **again))[0] == 200, "it is stored, even if the run is over"
    status, answer = await send(host, "POST", APPEND, b"5")
    assert status == 400
    assert "COMPLETED" in answer["error"]


async def test_the_part_id_takes_precedence_over_the_request_key(host: FakeHost) -> None:
    await host.create()
    for part, key in (("p", "1"), ("p", "2"), ("q", "1")):
        await send(host, "POST", APPEND, b"x", part_id=part, trigger_request_idempotency_key=key)
    assert len(await stored(host.broker)) == 2


async def test_an_append_is_limited_as_text_and_as_json() -> None:
    host = FakeHost(limits=Limits(append_bytes=10, chunk_bytes=20))
    await host.create()
    assert (await send(host, "POST", APPEND, b"1234567890"))[0] == 200
    status, answer = await send(host, "POST", APPEND, b"12345678901")
    assert status == 413 and "limit 10" in answer["error"]
    status, answer = await send(host, "POST", APPEND, b"\x00" * 4)
    assert status == 413 and "limit 20" in answer["error"], "each character takes six bytes as JSON"
    status, answer = await send(host, "POST", APPEND, b"\xff")
    assert status == 400 and "UTF-8" in answer["error"]
    assert await stored(host.broker) == [b'"1234567890"']
    assert Limits().append_bytes == 512 * 1024


async def test_a_cut_off_append_is_not_stored(host: FakeHost) -> None:
    await host.create()
    async with upload(host, APPEND) as writer:
        await writer.part(b"half a ")
        await writer.cut()
    assert await stored(host.broker) == []
    await check_released(host)
