"""Writing from outside, as the official SDK does: `streams.pipe`, `writer`, `append`, and `input().send`.

Whoever writes does so under a name, which is a producer of the stream: a request that is repeated, or that begins again
behind what is stored, stores nothing twice. The request of a writer is open as long as its source is, and each chunk is
stored as it comes.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence

import anyio.lowlevel
import msgspec
from starlette.responses import Response

from asgi_realtime.asgi.auth import authorise
from asgi_realtime.asgi.host import Host
from asgi_realtime.asgi.request import REQUEST_KEY, Request
from asgi_realtime.asgi.responses import error_response, json_response
from asgi_realtime.asgi.trigger_dev.credentials import require_secret
from asgi_realtime.asgi.trigger_dev.ndjson import LineSplitter
from asgi_realtime.brokers.base import Producer, StreamKey
from asgi_realtime.core.chunks import json_line
from asgi_realtime.core.errors import (
    InvalidRequest,
    ProducerGap,
    RequestCutOff,
    StreamClosed,
    UsageError,
    shown,
)
from asgi_realtime.core.names import input_stream, stream_name
from asgi_realtime.core.runs import RunRecord
from asgi_realtime.streams.writer import CALL_BYTES, CALL_ITEMS, encode_within

TARGETS = ("self", "parent", "root")
"""Whose stream is written, as seen from the run in the path."""

_CLIENT_ID = b"x-client-id"
_RESUME_FROM = b"x-resume-from-chunk"
_PART_ID = b"x-part-id"
_MAX_DIGITS = 15  # more than any stream has, and exact in every language

_UNDEFINED = b"undefined"
"""What the client sends for a chunk that has no JSON, such as a function: a line with an index, as all others."""


# A stream's writers


async def create_stream(request: Request, run_id: str, target: str, key: str) -> Response:
    """Make the run list a stream before anything is written. The body, if there is one, is of no meaning."""
    record, stream = await _find_stream(request, run_id, target, key)
    if record.is_completed:
        raise _over(record)

    await request.host.runs.add_stream(stream)
    return json_response({"version": "v1"}, 202)  # "v1" tells the client to write here and not to an S2 store


async def write_stream(request: Request, run_id: str, target: str, key: str) -> Response:
    """Append one chunk for each line of the body, as the lines come."""
    record, stream = await _find_stream(request, run_id, target, key)
    host = request.host
    producer, start = _writer(request)
    if record.is_completed and not await host.broker.produced(stream, producer):
        raise _over(record)  # at once; one that is done may hear that everything is stored

    body = _Body(host, record, stream, producer, start)
    request.subscription_limits.acquire(record.id, "")
    try:
        await host.runs.add_stream(stream)
        await body.read(request)
    except ProducerGap as gap:
        # Of a failure that it does not take for final the client asks by HEAD where to go on. 503 is such a one, and so
        # it sends again what it has and the broker has not, as after a failover. 409 would end the writer.
        told = f"chunk {body.index} cannot follow: of this writer {gap.expected} are stored; go on from there"
        return error_response(503, gap.code, told)
    finally:
        request.subscription_limits.release(record.id, "")
    return json_response({"ok": True})


async def last_index(request: Request, run_id: str, target: str, key: str) -> Response:
    """Tell a writer, in a header, the index of its last chunk that is stored; -1 if there is none."""
    _, stream = await _find_stream(request, run_id, target, key)
    client_id = request.name(_CLIENT_ID)
    if client_id is None:
        raise InvalidRequest("X-Client-Id is missing; it says which of the stream's writers asks")
    counted = await request.host.broker.produced(stream, f"client:{client_id}")
    return Response(headers={"x-last-chunk-index": str(counted - 1), "cache-control": "no-store"})


async def append(request: Request, run_id: str, target: str, key: str) -> Response:
    """Append the body, which is text, as one chunk: a JSON string."""
    record, stream = await _find_stream(request, run_id, target, key)
    limits = request.host.limits
    body = await request.body(limits.append_bytes)
    try:
        text = body.decode()
    except UnicodeDecodeError as exc:
        raise InvalidRequest(f"the body is no UTF-8 text: {exc}") from exc
    return await _append_once(request, record, stream, encode_within(text, limits.chunk_bytes))


def _writer(request: Request) -> tuple[str, int]:
    """The producer that a writer is, and the place of its first line."""
    client_id = request.name(_CLIENT_ID)
    text = (request.header(_RESUME_FROM) or b"0").decode("latin-1")
    if not (text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS):
        raise InvalidRequest(f"X-Resume-From-Chunk is {shown(text)}; it must be an integer from 0")
    start = int(text)
    if client_id is not None:
        return f"client:{client_id}", start
    if start:
        raise InvalidRequest(f"X-Resume-From-Chunk is {start} and X-Client-Id is missing: nobody can be resumed")
    return _nobody(), 0


class _Body:
    """Reads the body of a writer. `index` is that of the next chunk, in the writer's own count."""

    def __init__(self, host: Host, record: RunRecord, key: StreamKey, producer: str, start: int) -> None:
        self.index = start
        self._host = host
        self._record = record
        self._key = key
        self._producer = producer

    async def read(self, request: Request) -> None:
        """Return once everything is stored. What is refused leaves stored what came before it, and of a body that is
        cut off the last line is dropped, of which nobody knows whether it is whole.

        Raises `RequestCutOff`, `InvalidRequest`, `LimitExceeded`, `ProducerGap`, `RunNotFound`, `BrokerUnavailable`.
        """
        lines = LineSplitter(self._host.limits.chunk_bytes)
        more = True
        while more:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise RequestCutOff("the request's body was cut off; send again what is not confirmed")
            await self._store(lines.feed(message.get("body", b"")))
            more = message.get("more_body", False)
        await self._store(lines.rest())

    async def _store(self, lines: Iterator[bytes]) -> None:
        for number, items in enumerate(self._calls(lines)):
            if number:
                await anyio.lowlevel.checkpoint()  # a server may give a large body in one part
            await _append(self._host, self._record, self._key, items, Producer(self._producer, self.index))
            self.index += len(items)

    def _calls(self, lines: Iterator[bytes]) -> Iterator[list[bytes]]:
        """The chunks of the lines, as many as go out together, up to a line that is refused. Raises why it is."""
        items: list[bytes] = []
        size = 0
        refused: UsageError | None = None
        try:
            for line in lines:
                items.append(_chunk(line))
                size += len(line)
                if len(items) == CALL_ITEMS or size >= CALL_BYTES:
                    yield items
                    items, size = [], 0
        except UsageError as exc:
            exc.args = (f"chunk {self.index + len(items)}: {exc}",)
            refused = exc
        if items:
            yield items
        if refused is not None:
            raise refused


def _chunk(line: bytes) -> bytes:
    if line == _UNDEFINED:
        return b"null"
    try:
        return json_line(line)
    except UsageError as exc:
        raise InvalidRequest(f"{exc}; each line must be one JSON value") from exc


# An input


class _Sent(msgspec.Struct):
    data: msgspec.Raw = msgspec.Raw(b"")


async def send_input(request: Request, run_id: str, input_id: str) -> Response:
    """Append to an input of a run; `run.input(input_id)` gets it there."""
    claims = request.authenticate()
    record = await request.host.runs.get(run_id)
    authorise(claims, "write", [("inputStreams", run_id)])
    stream = StreamKey(record.id, input_stream(input_id, request.host.limits))

    data = _input_data(await request.body(request.host.limits.input_bytes))
    return await _append_once(request, record, stream, data)


def _input_data(body: bytes) -> bytes:
    try:
        line = json_line(body)
    except UsageError as exc:
        raise InvalidRequest(f"the body is malformed: {exc}") from exc
    if line == b"{}":  # what JSON.stringify makes of `{data: undefined}`
        return b"null"
    try:
        data = bytes(msgspec.json.decode(line, type=_Sent).data)
    except msgspec.ValidationError:
        data = b""
    if not data:
        raise InvalidRequest('the body must be a JSON object with "data", such as {"data": "yes"}')
    return data


# What they share


async def _find_stream(request: Request, run_id: str, target: str, key: str) -> tuple[RunRecord, StreamKey]:
    """The run that is written, and its stream. Streams are written by the host's own programs only.

    Raises `InvalidToken`, `ScopeDenied`, `UsageError`, `InvalidRequest`, `RunNotFound`.
    """
    require_secret(request.authenticate(), "writing a stream")
    name = stream_name(key, request.host.limits)
    if target not in TARGETS:
        raise InvalidRequest(f"the target is {shown(target)}; allowed are {', '.join(TARGETS)}")
    runs = request.host.runs
    record = await runs.get(run_id)
    wanted = {"self": record.id, "parent": record.parent_id, "root": record.root_id or record.id}[target]
    if wanted is None:
        raise InvalidRequest(f"run {shown(run_id)} has no parent; the targets that it has are self and root")
    if wanted != record.id:
        record = await runs.get(wanted)
    return record, StreamKey(record.id, name)


def _nobody() -> str:
    """The name of a producer that nobody repeats but we."""
    return f"once:{secrets.token_hex(8)}"


def _over(record: RunRecord) -> InvalidRequest:
    return InvalidRequest(f"run {shown(record.id)} is over ({record.status}); it takes nothing more")


async def _append_once(request: Request, record: RunRecord, key: StreamKey, item: bytes) -> Response:
    """Append one item, unless an earlier try of the same request has."""
    producer = _nobody()
    for header, kind in ((_PART_ID, "part"), (REQUEST_KEY, "request")):
        name = request.name(header)
        if name is not None:
            producer = f"{kind}:{name}"
            break
    await request.host.runs.add_stream(key)
    await _append(request.host, record, key, [item], Producer(producer, 0))
    return json_response({"ok": True})


async def _append(host: Host, record: RunRecord, key: StreamKey, items: Sequence[bytes], producer: Producer) -> None:
    """Append, waiting for a broker that is away. What the producer has stored before is skipped, whatever the state of
    the run. Raises `InvalidRequest` if the run is over."""
    try:
        await host.runs.retry(lambda: host.broker.append(key, items, producer=producer))
    except StreamClosed as exc:
        if record.is_completed:
            raise _over(record) from exc
        raise InvalidRequest(f"run {shown(key.run)} takes nothing more: {exc}") from exc
