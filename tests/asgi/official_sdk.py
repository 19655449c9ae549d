"""Requests of the official SDK, sent to a real `Realtime` without sockets."""

from __future__ import annotations

import json
from typing import Any

import pytest

from asgi_realtime import Realtime
from asgi_realtime.testing import AsgiClient, Response
from asgi_realtime.testing.driver import make_scope
from tests.inprocess import SECRET, make_realtime

KEY = {"idempotencyKey": "k"}
REQUEST_KINDS = pytest.mark.parametrize(
    ("anyio_backend", "one_time", "options"),
    [("asyncio", True, {}), ("asyncio", False, KEY), ("trio", True, KEY), ("trio", False, {})],
)
"""Each pair of an event loop, a token kind, and a request with or without an idempotency key."""

on_one_loop = pytest.mark.parametrize("anyio_backend", ["asyncio"])
"""For tables of inputs, which do not depend on the event loop."""


class Answer:
    """A response and its JSON."""

    def __init__(self, response: Response) -> None:
        self.status = response.status_code
        self.headers = response.headers
        self.json: Any = json.loads(response.body)

    @property
    def error(self) -> str:
        text: str = self.json["error"]
        return text

    @property
    def token(self) -> str:
        """The public token of the handle."""
        return self.headers["x-trigger-jwt"]


async def call(
    app: Realtime, method: str, path: str, body: Any = None, *, token: str = SECRET, key: str | None = None
) -> Answer:
    """`key` is the idempotency key of the request. A body that is not bytes is sent as JSON."""
    headers = {"authorization": f"Bearer {token}", "trigger-version": "4.8.3"}
    if key is not None:
        headers["x-trigger-request-idempotency-key"] = key
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    return Answer(await AsgiClient(app).request(method, path, headers=headers, body=data))


async def send_cut_off(app: Realtime, path: str, body: bytes) -> int:
    """Send part of a body and disconnect; returns the status."""
    messages: list[Any] = [{"type": "http.request", "body": body, "more_body": True}, {"type": "http.disconnect"}]
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    await app(make_scope("POST", path, headers={"authorization": f"Bearer {SECRET}"}), receive, send)
    return int(sent[0]["status"])


async def trigger(
    app: Realtime, task: str, payload: Any = None, *, token: str = SECRET, key: str | None = None, **options: Any
) -> Answer:
    body = {"payload": payload, "options": options}
    return await call(app, "POST", f"/api/v1/tasks/{task}/trigger", body, token=token, key=key)


def item(index: int, payload: Any, task: str = "echo", **options: Any) -> dict[str, Any]:
    return {"index": index, "task": task, "payload": payload, "options": options}


def lines(*items: Any) -> bytes:
    return b"".join(json.dumps(item).encode() + b"\n" for item in items)


async def create_batch(
    app: Realtime, count: int, *, token: str = SECRET, key: str | None = None, **more: Any
) -> Answer:
    return await call(app, "POST", "/api/v3/batches", {"runCount": count, **more}, token=token, key=key)


async def fill_batch(app: Realtime, batch_id: str, body: bytes, *, token: str = SECRET) -> Answer:
    return await call(app, "POST", f"/api/v3/batches/{batch_id}/items", body, token=token)


async def count_runs(app: Realtime, topic: str) -> int:
    return len((await app.broker.changes(topic)).items)


def with_tasks(**options: Any) -> Realtime:
    """A `Realtime` with the tasks `echo`, which returns its payload, `nothing`, which has none, and `number`."""
    realtime = make_realtime(**options)

    @realtime.task("echo")
    async def echo(payload: Any) -> Any:
        return payload

    @realtime.task("nothing")
    async def nothing() -> None: ...

    @realtime.task("number")
    async def number(payload: int) -> int:
        return payload

    return realtime
