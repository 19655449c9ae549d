"""What the worst request of a browser token costs everyone else: `python -m benchmarks abuse`.

For each kind of request that a token allows, its worst body within the limits, and

* the longest time for which the event loop is blocked, in CPU time, so that a busy machine does not distort it,
* the memory that remains allocated afterwards, and the part of it that the memory broker counts.

To add a kind of request, add a function that returns an `Attack` to `ATTACKS`.
"""

from __future__ import annotations

import asyncio
import gc
import json
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from asgi_realtime import Realtime
from asgi_realtime.testing import AsgiClient

BLOCKED_MS = 100.0
"""The goal: no request blocks the event loop for longer."""

_SECRET = "abuse-secret-key-0123456789-abcdefghijklmnop"
_KIB = 1024
_MIB = 1024 * 1024
_PAYLOAD = 3 * _MIB - 64
_METADATA = 256 * _KIB - 64
_SUPERJSON = 256 * _KIB - 64
_SETTLE_S = 0.2


@dataclass(frozen=True, slots=True)
class Attack:
    """One request. The path can contain `{run}` and `{batch}`."""

    name: str
    body: bytes = b""
    token: str = "trigger"
    path: str = "/api/v1/tasks/chat/trigger"
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Row:
    """What an attack cost."""

    name: str
    token: str
    sent: int
    status: int
    blocked_ms: float
    held: int
    counted: int


class _Loop(asyncio.SelectorEventLoop):
    """Measures the CPU time of its longest iteration: the time for which it runs nothing else."""

    longest_s = 0.0

    def _run_once(self) -> None:
        begin = time.thread_time()
        super()._run_once()  # type: ignore[misc]
        self.longest_s = max(self.longest_s, time.thread_time() - begin)


def _fill(start: bytes, item: bytes, end: bytes, size: int) -> bytes:
    """`item` repeated to a size, separated by commas."""
    return start + b",".join([item] * max(1, (size - len(start) - len(end)) // (len(item) + 1))) + end


def _numbered(start: bytes, item: str, end: bytes, size: int) -> bytes:
    """As `_fill`, with a different item each time."""
    count = (size - len(start) - len(end)) // (len(item % 0) + 6)
    return start + b",".join((item % number).encode() for number in range(count)) + end


def _payload(name: str, payload: bytes) -> Attack:
    return Attack(f"payload: {name}", b'{"payload":' + payload + b"}")


def _metadata(name: str, metadata: bytes) -> Attack:
    return Attack(f"metadata: {name}", b'{"payload":1,"options":{"metadata":' + metadata + b"}}")


def _superjson(name: str, value: bytes, values: bytes) -> Attack:
    text = json.dumps((b'{"json":' + value + b',"meta":{"values":' + values + b"}}").decode()).encode()
    return Attack(f"superjson: {name}", b'{"payload":' + text + b',"options":{"payloadType":"application/super+json"}}')


def _deep_superjson() -> Attack:
    depth, width = 90, _SUPERJSON // 20
    inner = _numbered(b"{", '"%d":["undefined"]', b"}", _SUPERJSON - 20 * depth - 2 * width)
    value = b"[" * depth + _fill(b"[", b"0", b"]", 2 * width) + b"]" * depth
    return _superjson("annotations of a deep list", value, b'{"%b":%b}' % (b".".join([b"0"] * depth), inner))


def _dotted_superjson() -> Attack:
    names = _numbered(b'{"a":{},', '"a.%d":0', b"}", _SUPERJSON - 64)
    return _superjson("names with dots", names, b'{"a":["undefined"]}')


def _urls_superjson() -> Attack:
    url = b'"http://' + b"a." * 20 + b'a"'
    size = _SUPERJSON * 2 // 3
    urls = _fill(b"[", url, b"]", size)
    return _superjson("URLs", urls, _numbered(b"{", '"%d":["URL"]', b"}", _SUPERJSON - size))


def _batch(name: str, payload: bytes, count: int) -> Attack:
    lines = (b'{"index":%d,"task":"chat","payload":%b}\n' % (index, payload) for index in range(count))
    return Attack(f"batch: {name}", b"".join(lines), "batch", "/api/v3/batches/{batch}/items")


ATTACKS: list[Callable[[], Attack]] = [
    lambda: _payload("text", b'"%b"' % (b"x" * _PAYLOAD)),
    lambda: _payload("lists and objects", _fill(b"[", b"{}" + b" " * 33, b"]", _PAYLOAD)),
    lambda: _payload("nested lists", _fill(b"[", b"[" * 99 + b"]" * 99 + b" " * 3100, b"]", _PAYLOAD)),
    lambda: _payload("too many lists", _fill(b"[", b"[]", b"]", _PAYLOAD)),
    lambda: _payload("different names", _numbered(b"{", '"%d":"' + "x" * 24 + '"', b"}", _PAYLOAD)),
    lambda: _payload("short texts", _numbered(b"[", '"%d"', b"]", _PAYLOAD)),
    lambda: _payload("floats", _fill(b"[", b"1.5e3", b"]", _PAYLOAD)),
    lambda: _payload("escapes", b'"\\ud800' + b"\\n" * (_PAYLOAD // 2) + b'"'),
    lambda: _payload("halves of characters", b'"' + b"\\ud800" * (_PAYLOAD // 6) + b'"'),
    lambda: _payload("brackets in texts", _fill(b"[", b'"["', b"]", _PAYLOAD)),
    lambda: _metadata("lists", _fill(b'{"a":[', b"[]         ", b"]}", _METADATA)),
    lambda: _metadata("different names", _numbered(b"{", '"%d":0     ', b"}", _METADATA)),
    lambda: _metadata("as deep as allowed", b'{"a":' + b"[" * 99 + b"]" * 99 + b"}"),
    _deep_superjson,
    _dotted_superjson,
    _urls_superjson,
    lambda: _batch("1,000 short items", b"1", 1000),
    lambda: _batch("10 payloads of 3 MiB", _numbered(b"[", '"%d"', b"]", _PAYLOAD), 10),
    lambda: Attack(
        "input: short texts",
        _numbered(b'{"data":[', '"%d"', b"]}", _MIB - 64),
        "handle",
        "/v1/streams/{run}/input/go",
    ),
    lambda: Attack(
        "feed: a long query",
        token="handle",
        path="/v1/runs/{run}?" + "%61=1&" * (60 * _KIB // 6),
        method="GET",
        headers={"accept": "application/json"},
    ),
]


async def _request(client: AsgiClient, realtime: Realtime, attack: Attack, run_id: str) -> int:
    """Send an attack, and return the status of the response."""
    if attack.token == "handle":
        token = realtime.create_public_token(scopes=[f"read:runs:{run_id}", f"write:inputStreams:{run_id}"])
    elif attack.token == "batch":
        token = realtime.create_batch_trigger_public_token("chat", multiple_use=True)
    else:
        token = realtime.create_trigger_public_token("chat", multiple_use=True)
    path = attack.path
    if "{batch}" in path:
        created = {"runCount": attack.body.count(b"\n"), "taskIdentifiers": ["chat"]}
        batch = (await client.post("/api/v3/batches", json=created, token=token)).json()
        path = path.replace("{batch}", batch["id"])
    path = path.replace("{run}", run_id)
    response = await client.request(attack.method, path, body=attack.body, token=token, headers=attack.headers)
    return response.status_code


async def _measure(make: Callable[[], Attack], loop: _Loop) -> Row:
    """Send an attack twice: once for the time, and once for the memory, because tracing it takes time."""
    attack = make()
    realtime = Realtime(secret_key=_SECRET)

    @realtime.task("chat")
    async def chat(payload: Any) -> None:
        return None

    async with AsgiClient(realtime, timeout=60) as client, realtime.open_run("host") as run:
        gc.collect()
        await asyncio.sleep(_SETTLE_S)
        loop.longest_s = 0.0
        status = await _request(client, realtime, attack, run.id)
        await asyncio.sleep(_SETTLE_S)
        blocked_s = loop.longest_s

        gc.collect()
        tracemalloc.start()
        before, counted = tracemalloc.get_traced_memory()[0], realtime.broker.size  # type: ignore[attr-defined]
        await _request(client, realtime, attack, run.id)
        await asyncio.sleep(_SETTLE_S)
        gc.collect()
        held = tracemalloc.get_traced_memory()[0] - before
        counted = realtime.broker.size - counted  # type: ignore[attr-defined]
        tracemalloc.stop()
        run.set_output(None)
    sent = len(attack.body) or len(attack.path)
    return Row(attack.name, attack.token, sent, status, blocked_s * 1000, held, counted)


def measure(make: Callable[[], Attack]) -> Row:
    """Run one attack in an event loop of its own."""
    loop = _Loop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(_measure(make, loop))


def render(rows: list[Row]) -> str:
    """The table as text."""
    lines = [f"{'request':<38}{'token':<9}{'sent KiB':>9}{'status':>8}{'CPU ms':>8}{'held KiB':>10}{'counted':>9}"]
    for row in rows:
        late = " !" if row.blocked_ms > BLOCKED_MS else ""
        lines.append(
            f"{row.name:<38}{row.token:<9}{row.sent / _KIB:>9.0f}{row.status:>8}{row.blocked_ms:>8.1f}"
            f"{row.held / _KIB:>10.0f}{row.counted / _KIB:>9.0f}{late}"
        )
    lines.append(f"CPU ms: the longest time for which the event loop was blocked; goal: {BLOCKED_MS:.0f}")
    return "\n".join(lines)


def main() -> int:
    """Print the table. Returns 1 if a request blocked the event loop for too long."""
    rows = [measure(make) for make in ATTACKS]
    print(render(rows))
    return int(any(row.blocked_ms > BLOCKED_MS for row in rows))
