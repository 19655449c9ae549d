"""Inputs of runs, sent over HTTP as the official SDK does with `input().send`."""

from __future__ import annotations

import msgspec
from starlette.responses import Response

from asgi_realtime.asgi.auth import authorize
from asgi_realtime.asgi.request import Request
from asgi_realtime.asgi.trigger_dev.stream_writers import append_once
from asgi_realtime.brokers.base import StreamKey
from asgi_realtime.core.chunks import json_line
from asgi_realtime.core.errors import InvalidRequest, UsageError
from asgi_realtime.core.names import input_stream


class _InputMessage(msgspec.Struct):
    data: msgspec.Raw = msgspec.Raw(b"")


async def send_input(request: Request, run_id: str, input_id: str) -> Response:
    """Append to an input of a run, which the run receives through `run.input(input_id)`."""
    record = await request.host.runs.get(run_id)
    authorize(request.claims, "write", [("inputStreams", run_id)])
    stream = StreamKey(record.id, input_stream(input_id, request.host.limits))

    data = _input_data(await request.body(request.host.limits.input_bytes))
    return await append_once(request, record, stream, data)


def _input_data(body: bytes) -> bytes:
    try:
        line = json_line(body)
    except UsageError as exc:
        raise InvalidRequest(f"the body is malformed: {exc}") from exc
    if line == b"{}":  # the result of JSON.stringify({data: undefined})
        return b"null"
    try:
        data = bytes(msgspec.json.decode(line, type=_InputMessage).data)
    except msgspec.ValidationError:
        data = b""
    if not data:
        raise InvalidRequest('the body must be a JSON object with "data", such as {"data": "yes"}')
    return data
