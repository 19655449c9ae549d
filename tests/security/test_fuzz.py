"""Damaged requests, 50,000 of them: each gets a correct error, and none leaves anything behind.

A failure prints the request, and the seed that makes it. `FUZZ_SEED=7` tries other requests.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from random import Random
from typing import Any

import anyio
import pytest

from asgi_realtime import Cors, Grant, Realtime, Retention, Run, Timeouts
from tests.faults import others
from tests.inprocess import GUARD_S, until
from tests.security.exchange import Received, exchange
from tests.security.mutations import Known, Mutator, Sent

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.parametrize("anyio_backend", ["asyncio"])]

SECRET = "fuzz-secret-of-the-tests-32-bytes-or-more"
OTHER_SECRET = "fuzz-secret-of-another-server-32-bytes-or-more"
SEED = os.environ.get("FUZZ_SEED", "0")
PART = 5000
CONCURRENT = 8
MUST_REFETCH = 409
"""Of a poll: its body is the message that the official client expects."""

TIMEOUTS = Timeouts(tick=0.02, poll=0.01, find=0.002, receive=1.0, drain=0.02, cancel=1.0, append=1.0, writer=1.0)
SCOPES: tuple[list[str], ...] = (
    ["read:runs"],
    ["read:tags:t", "read:batch"],
    ["trigger:tasks:echo", "trigger:tasks:hold"],
    ["trigger:tasks", "batchTrigger:tasks"],
    ["write:runs", "read:runs"],
    ["write:inputStreams", "read:inputStreams", "read:runs"],
    ["admin"],
    ["", ":", "read:", "read:runs:", "*:*", "x" * 500],
)


def make(broker: str) -> Realtime:
    realtime = Realtime(
        secret_key=SECRET,
        broker=broker,
        cors=Cors(),
        authorize=lambda request, resource: resource.run_id != "run_missing" and Grant(owner="user:2"),
        inspector=True,
        timeouts=TIMEOUTS,
        signals=False,
        retention=Retention(after_end=5),
    )

    @realtime.task("echo")
    async def echo(payload: Any) -> Any:
        return payload

    @realtime.task("talk")
    async def talk(payload: Any) -> None:
        for number in range(3):
            await realtime.append(number)

    @realtime.task("typed")
    async def typed(payload: dict[str, list[int]]) -> None: ...

    @realtime.task("hold")
    async def hold(payload: Any, run: Run) -> Any:
        return await run.input("end").get(timeout="1h")

    return realtime


async def what_a_client_knows(realtime: Realtime) -> Known:
    tasks = ("echo", "talk", *["hold"] * 20)
    runs = [(await realtime.trigger(task, {"a": [1]}, tags=["t"])).id for task in tasks]
    batch = await realtime.batch_trigger([("echo", 1), ("talk", 2)])
    other = Realtime(secret_key=OTHER_SECRET, signals=False)
    tokens = [realtime.tokens.mint(scopes, expires_in_s=3600, extra={"fuzz": 1}) for scopes in SCOPES]
    tokens += [realtime.tokens.mint(["read:runs"], expires_in_s=1e-9, extra={"fuzz": 1})] * 2
    tokens += [
        realtime.tokens.mint(["trigger:tasks"], expires_in_s=60, one_time=True, owner="user:1") for _ in range(2)
    ]
    tokens += [realtime.tokens.mint(["read:runs"], expires_in_s=60, skip_columns=["payload"], extra={"fuzz": 1})]
    tokens += [other.tokens.mint(["admin"], expires_in_s=60)]
    return Known(
        runs=[*runs, "run_missing"],
        batches=[batch.id, "batch_missing"],
        credentials=[*tokens, *[SECRET] * len(tokens), "", "x", "a.b.c"],
        tasks=("echo", "talk", "typed", "hold", "missing"),
    )


class Log(logging.Handler):
    """What the app logs from INFO on."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.errors: list[str] = []
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = logging.Formatter().format(record)
        self.texts.append(text)
        if record.levelno >= logging.ERROR or record.exc_info:
            self.errors.append(text)


@pytest.fixture
def log() -> Iterator[Log]:
    handler = Log()
    loggers = [logging.getLogger(name) for name in ("asgi_realtime", "asyncio")]
    for logger in loggers:
        logger.addHandler(handler)
    yield handler
    for logger in loggers:
        logger.removeHandler(handler)


def check(request: Sent, received: Received) -> None:
    if request.cut and not received.starts:
        return
    assert len(received.starts) == 1, "one start of a response"
    headers, status = received.headers, received.status
    assert 200 <= status < 500 or status == 503, "no failure of the server"
    assert headers[b"access-control-allow-origin"] == b"*" or (b"origin", b"https://app.example") not in request.headers
    assert SECRET.encode() not in received.raw, "the secret"
    if len(request.credential) > 40:
        assert request.credential.encode("latin-1") not in received.raw, "the token of the request"
    if status >= 400 and status != MUST_REFETCH and request.method != "HEAD":
        assert headers[b"content-type"] == b"application/json"
        assert isinstance(json.loads(received.body)["error"], str)


def learn(known: Known, received: Received) -> None:
    """Remember a new batch, so that later requests can fill it."""
    if received.status == 202 and b'"runCount"' in received.body:
        known.batches[1:] = [json.loads(received.body)["id"], *known.batches[1:4]]


async def attack(realtime: Realtime, known: Known, seed: str, statuses: Counter[int]) -> None:
    requests = Mutator(Random(seed), known).requests(PART)

    async def worker() -> None:
        for request in requests:
            try:
                received = await exchange(realtime, request)
                statuses[received.status] += 1
                check(request, received)
                learn(known, received)
            except Exception as exc:
                exc.add_note(f"seed {seed!r}: {request!r}, credential {request.credential!r}")
                raise

    async with anyio.create_task_group() as tasks:
        for _ in range(CONCURRENT):
            tasks.start_soon(worker)


async def fuzz(broker: str, seed: str, log: Log) -> None:
    before = others()
    statuses: Counter[int] = Counter()
    async with make(broker) as realtime:
        known = await what_a_client_knows(realtime)
        await attack(realtime, known, seed, statuses)

        limits = realtime.respond.__self__.subscription_limits  # type: ignore[attr-defined]
        await until(lambda: not limits.open and not realtime.subscribers)
        assert not limits._bodies
        served = await realtime.trigger("echo", "still served")
        assert await realtime.result(served, timeout=GUARD_S) == "still served"
    await until(lambda: others() == before)
    assert log.errors == []
    assert not any(secret in text for text in log.texts for secret in known.credentials if len(secret) > 40)
    assert statuses[200] + statuses[202] > PART // 10, f"too few of the requests were valid: {statuses}"


@pytest.mark.parametrize("part", range(9))
async def test_damaged_requests(part: int, log: Log) -> None:
    await fuzz("memory://", f"{SEED}/{part}", log)


@pytest.mark.redis
async def test_damaged_requests_over_redis(redis_url: str, log: Log) -> None:
    await fuzz(redis_url, f"{SEED}/redis", log)
