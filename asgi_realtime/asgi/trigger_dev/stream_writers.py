"""Streams and inputs written over HTTP, as the official SDK does with `streams.pipe`, `writer`, `append` and
`input().send`.

Each client writes as a named producer of the stream, so when it repeats or resumes a request, the broker skips the
chunks that it has already stored. The request of a writer stays open as long as its source does, and each chunk is
stored when it arrives.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from time import perf_counter

import anyio.lowlevel
import msgspec
from starlette.responses import Response

from asgi_realtime.asgi.auth import authorize
from asgi_realtime.asgi.host import Host
from asgi_realtime.asgi.request import REQUEST_KEY, Request
from asgi_realtime.asgi.responses import NOT_CACHED, error_response, json_response
from asgi_realtime.asgi.trigger_dev.credentials import require_secret
from asgi_realtime.asgi.trigger_dev.decoding import read_json, read_line
from asgi_realtime.asgi.trigger_dev.ndjson import LineSplitter
from asgi_realtime.brokers.base import Producer, StreamKey
from asgi_realtime.core.chunks import json_line
from asgi_realtime.core.errors import InvalidRequest, ProducerGap, RequestCutOff, StreamClosed, UsageError, shown
from asgi_realtime.core.names import input_stream, stream_name
from asgi_realtime.core.runs import StoredRecord
from asgi_realtime.streams.outbox import CALL_BYTES, CALL_ITEMS
from asgi_realtime.streams.writer import encode_within

TARGETS = ("self", "parent", "root")
"""Which run is written to, relative to the run in the path."""

_CLIENT_ID = b"x-client-id"
_RESUME_FROM = b"x-resume-from-chunk"
_PART_ID = b"x-part-id"
_MAX_DIGITS = 15  # longer than any stream, and exact in JavaScript

_UNDEFINED = b"undefined"
"""The line that the client sends for a chunk without a JSON form, such as a function. It takes an index too."""


class _InputMessage(msgspec.Struct):
    data: msgspec.Raw = msgspec.Raw(b"")


async def create_stream(request: Request, run_id: str, target: str, key: str) -> Response:
    """List a stream in its run before the first chunk is written. The body is ignored."""
    record, stream = await _find_stream(request, run_id, target, key)
    if record.is_completed:
        raise _run_over(record)

    await request.host.runs.add_stream(stream)
    return json_response({"version": "v1"}, 202)  # "v1" makes the client write here and not to an S2 store


async def write_stream(request: Request, run_id: str, target: str, key: str) -> Response:
    """Append one chunk for each line of the body, as the lines arrive."""
    record, stream = await _find_stream(request, run_id, target, key)
    host = request.host
    producer, start = _writer(request)
    if record.is_completed and not await host.broker.produced(stream, producer):
        raise _run_over(record)  # but a writer that repeats stored chunks gets 200

    body = _WriterBody(host, record, stream, producer, start)
    request.subscription_limits.acquire(record.id, "")
    try:
        await host.runs.add_stream(stream)
        await body.read(request)
    except ProducerGap as gap:
        # The client retries 503: it sends HEAD to learn where to resume. So after a failover it sends what the broker
        # has lost. 409 would end the writer.
        message = f"chunk {body.index} leaves a gap: {gap.expected} are stored of this writer; resume after those"
        return error_response(503, gap.code, message)
    finally:
        request.subscription_limits.release(record.id, "")
    return json_response({"ok": True})


async def last_index(request: Request, run_id: str, target: str, key: str) -> Response:
    """Respond with a header that holds the index of the writer's last stored chunk, or -1."""
    _, stream = await _find_stream(request, run_id, target, key)
    client_id = request.name(_CLIENT_ID)
    if client_id is None:
        raise InvalidRequest("X-Client-Id is missing; it identifies the writer")
    count = await request.host.broker.produced(stream, f"client:{client_id}")
    return Response(headers={"x-last-chunk-index": str(count - 1), "cache-control": NOT_CACHED})


async def append(request: Request, run_id: str, target: str, key: str) -> Response:
    """Append the body as one chunk. It is text, so the chunk is a JSON string."""
    record, stream = await _find_stream(request, run_id, target, key)
    limits = request.host.limits
    body = await request.body(limits.append_bytes)
    try:
        text = body.decode()
    except UnicodeDecodeError as exc:
        raise InvalidRequest(f"the body is not UTF-8 text: {exc}") from exc
    return await _append_once(request, record, stream, encode_within(text, limits.chunk_bytes))


async def send_input(request: Request, run_id: str, input_id: str) -> Response:
    """Append to an input of a run, which the run receives through `run.input(input_id)`."""
    record = await request.host.runs.get(run_id)
    authorize(request.claims, "write", [("inputStreams", run_id)])
    stream = StreamKey(record.id, input_stream(input_id, request.host.limits))

    data = _input_data(await request.body(request.host.limits.input_bytes))
    if not request.owner:
        return await _append_once(request, record, stream, data)
    async with request.host.tasks.budgets.input(request.owner, record.id, len(data)):
        return await _append_once(request, record, stream, data)


def _input_data(body: bytes) -> bytes:
    line = read_line(body)
    if line == b"{}":  # the result of JSON.stringify({data: undefined})
        return b"null"
    data = bytes(read_json(line, _InputMessage).data)
    if not data:
        raise InvalidRequest('the body must be a JSON object with "data", such as {"data": "yes"}')
    return data


def _writer(request: Request) -> tuple[str, int]:
    """The producer of a writer, and the index of its first line."""
    client_id = request.name(_CLIENT_ID)
    text = (request.header(_RESUME_FROM) or b"0").decode("latin-1")
    if not (text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS):
        raise InvalidRequest(f"X-Resume-From-Chunk is {shown(text)}; it must be an integer of 0 or more")
    start = int(text)
    if client_id is not None:
        return f"client:{client_id}", start
    if start:
        raise InvalidRequest(f"X-Resume-From-Chunk is {start} without X-Client-Id; send both to resume a writer")
    return _new_producer(), 0


class _WriterBody:
    """Appends the body of a writer while it arrives. `index` is the writer's own index of its next chunk."""

    def __init__(self, host: Host, record: StoredRecord, key: StreamKey, producer: str, start: int) -> None:
        self.index = start
        self._host = host
        self._record = record
        self._key = key
        self._producer = producer

    async def read(self, request: Request) -> None:
        """Return once everything is stored.

        Lines before a rejected line are stored. If the body is cut off, its last line is dropped, because it can be
        incomplete. Raises `RequestCutOff`, `InvalidRequest`, `LimitExceeded`, `ProducerGap`, `RunNotFound`,
        `BrokerUnavailable`.
        """
        lines = LineSplitter(self._host.limits.chunk_bytes)
        more = True
        while more:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise RequestCutOff("the request body was cut off; send again what was not confirmed")
            await self._store(lines.feed(message.get("body", b"")))
            more = message.get("more_body", False)
        await self._store(lines.rest())

    async def _store(self, lines: Iterator[bytes]) -> None:
        for number, chunks in enumerate(self._calls(lines)):
            if number:
                await anyio.lowlevel.checkpoint()  # some servers deliver a large body in one part
            await _append(self._host, self._record, self._key, chunks, Producer(self._producer, self.index))
            self.index += len(chunks)

    def _calls(self, lines: Iterator[bytes]) -> Iterator[list[bytes]]:
        """The chunks of each broker call. Chunks before an invalid line are yielded before its error is raised."""
        chunks: list[bytes] = []
        size = 0
        error: UsageError | None = None
        try:
            for line in lines:
                chunks.append(_chunk(line))
                size += len(line)
                if len(chunks) == CALL_ITEMS or size >= CALL_BYTES:
                    yield chunks
                    chunks, size = [], 0
        except UsageError as exc:
            exc.args = (f"chunk {self.index + len(chunks)}: {exc}",)
            error = exc
        if chunks:
            yield chunks
        if error is not None:
            raise error


def _chunk(line: bytes) -> bytes:
    if line == _UNDEFINED:
        return b"null"
    try:
        return json_line(line)
    except UsageError as exc:
        raise InvalidRequest(f"{exc}; each line must be one JSON value") from exc


async def _find_stream(request: Request, run_id: str, target: str, key: str) -> tuple[StoredRecord, StreamKey]:
    """The run that is written to, and its stream. Takes the secret key, because only the host's programs write streams.

    Raises `InvalidToken`, `ScopeDenied`, `UsageError`, `InvalidRequest`, `RunNotFound`.
    """
    require_secret(request, "writing a stream")
    name = stream_name(key, request.host.limits)
    if target not in TARGETS:
        raise InvalidRequest(f"the target is {shown(target)}; allowed are {', '.join(TARGETS)}")
    runs = request.host.runs
    record = await runs.get(run_id)
    target_id = {"self": record.id, "parent": record.parent_id, "root": record.root_id or record.id}[target]
    if target_id is None:
        raise InvalidRequest(f"run {shown(run_id)} has no parent; allowed targets are self and root")
    if target_id != record.id:
        record = await runs.get(target_id)
    return record, StreamKey(record.id, name)


def _new_producer() -> str:
    """A producer for one request. Only our own retries of the broker call repeat its items."""
    return f"once:{secrets.token_hex(8)}"


def _run_over(record: StoredRecord) -> InvalidRequest:
    return InvalidRequest(f"run {shown(record.id)} is over ({record.status}) and accepts no more chunks")


async def _append_once(request: Request, record: StoredRecord, key: StreamKey, item: bytes) -> Response:
    """Append one item, unless an earlier attempt of the same request has appended it."""
    part, call = request.name(_PART_ID), request.name(REQUEST_KEY)
    producer = f"part:{part}" if part else f"request:{call}" if call else _new_producer()
    await request.host.runs.add_stream(key)
    await _append(request.host, record, key, [item], Producer(producer, 0))
    return json_response({"ok": True})


async def _append(host: Host, record: StoredRecord, key: StreamKey, items: Sequence[bytes], producer: Producer) -> None:
    """Append, waiting while the broker is unavailable. Items that the producer has stored before are skipped, even if
    the run is over. Raises `InvalidRequest` for new items of a run that is over."""
    began = perf_counter()
    try:
        position = await host.runs.retry(host.broker.append, key, items, producer=producer)
    except StreamClosed as exc:
        if record.is_completed:
            raise _run_over(record) from exc
        raise InvalidRequest(f"run {shown(key.run)} accepts no more chunks: {exc}") from exc
    reporter = host.runs.reporter
    reporter.appended(key, position.last - len(items) + 1, perf_counter() - began)
    reporter.writer_closed(len(items), sum(map(len, items)))
