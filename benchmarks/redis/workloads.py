"""The workloads over Redis. What subscribers receive is verified as always; stored streams are read back and compared.

A delivery is one chunk at one subscriber. `us` is CPU time per delivery, separate for web, worker and Redis.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Any, cast

import redis

from asgi_realtime.brokers.redis.scripts import APPEND
from benchmarks.chunks import parse_text
from benchmarks.client import Subscriber, Verdict, close_subscribers, judge, open_subscribers
from benchmarks.process import Target
from benchmarks.redis.site import RedisServer, Site, start_site
from benchmarks.workloads import (
    Meter,
    Result,
    Workload,
    fan_out,
    finish,
    last_arrival,
    open_readers,
    paced,
    per_event,
    quiet_client,
    receive_all,
)

_WARM_UP = 64
_PAGE = 5000
_SIZE = 100
_SAMPLE = 100
"""Resumes with individually recorded commands."""


def _site(target: Target) -> tuple[Site, RedisServer]:
    assert isinstance(target, Site) and target.redis is not None
    return target, target.redis


async def store(target: Target, quick: bool, *, streams: int, chunks: int, seconds: float) -> Result:
    """Sources that yield without pause, until Redis has acknowledged every chunk."""
    _, server = _site(target)
    if quick:
        streams, chunks, seconds = max(1, streams // 20), chunks // 50, 0.5
    await target.call("store", streams=1, each=_WARM_UP, size=_SIZE, seconds=5)
    with quiet_client():
        before = server.executed()
        meter = Meter(target)
        stored = await target.call("store", streams=streams, each=chunks // streams, size=_SIZE, seconds=seconds)
        metrics = meter.read(time.monotonic_ns())
        executed = _difference(server.executed(), before)
    total = sum(count for _, count in stored)
    metrics |= per_event(metrics, total)
    metrics |= {"sent": _appends(executed) / total, "executed": sum(executed.values()) / total}
    return Result(metrics, _judge_stored(server.client, stored, _SIZE))


async def storm(target: Target, quick: bool, *, streams: int, subscribers: int) -> Result:
    """All subscribers lose their connections, miss as many chunks as they had, and resume together by Last-Event-ID."""
    site = cast(Site, target)
    if quick:
        streams, subscribers = max(1, streams // 20), max(1, subscribers // 20)
    each = 20
    names = [f"s{number}" for number in range(streams)]
    readers = await open_readers(target, names, subscribers)
    await target.call("fill", streams=names, count=each)
    await receive_all(target, readers, each)
    total = 2 * each
    readers = await _cut(readers)
    await target.call("fill", streams=names, count=each)
    await asyncio.sleep(0.5)
    with quiet_client():
        before = site.redis.executed() if site.redis is not None else {}
        meter = Meter(target)
        await open_subscribers(target.port, readers, at_once=len(readers))
        await receive_all(target, readers, total)
        metrics = meter.read(last_arrival(readers))
        executed = _difference(site.redis.executed(), before) if site.redis is not None else {}
    metrics |= per_event(metrics, len(readers))
    metrics["wait_s"] = metrics["wall_s"]
    if site.redis is not None:
        metrics["executed"] = sum(executed.values()) / len(readers)
        again = await _cut(readers[:_SAMPLE])
        await asyncio.sleep(0.2)
        async with site.redis.sent_by(site.web.pid) as sent:
            await target.call("fill", streams=names, count=1)
            total += 1
            await open_subscribers(target.port, again, at_once=len(again))
            await receive_all(target, again, total)
        metrics["sent"] = len(sent) / len(again)
        readers = [*again, *readers[_SAMPLE:]]
        await receive_all(target, readers, total)
    return await finish(target, names, readers, total, metrics)


async def _cut(readers: list[Subscriber]) -> list[Subscriber]:
    """Cut all connections, and return subscribers that resume them."""
    await close_subscribers(readers)
    await asyncio.sleep(0.2)  # until the server has noticed
    return [reader.resumed() for reader in readers]


async def footprint(target: Target, quick: bool) -> Result:
    """The memory of a stream in Redis, the commands of a single chunk, and the connections of a process."""
    site, server = _site(target)
    chunks, seconds, rate = 1000, 0.5 if quick else 3.0, 20
    metrics: dict[str, float] = {}
    verdict = Verdict()
    for size in (20, 100):
        stored = await target.call("store", streams=1, each=chunks, size=size, seconds=30)
        metrics[f"bytes_{size}"] = _memory(server.client, stored[0][0]) / chunks
        found = _judge_stored(server.client, stored, size)
        verdict = Verdict(
            *(getattr(verdict, name) + getattr(found, name) for name in ("missing", "duplicated", "damaged"))
        )
    readers = await open_readers(target, ["slow"], 1)
    async with server.sent_by(site.worker.pid) as sent:
        await asyncio.sleep(seconds)
    metrics["idle_sent"] = len(sent) / seconds
    count = int(rate * seconds)
    async with server.sent_by(site.worker.pid) as sent:
        await target.call("pace", streams=["slow"], rate=rate, count=count, start_ns=time.monotonic_ns())
        await receive_all(target, readers, count)
    append = f"EVALSHA {APPEND.sha.decode()}"
    metrics |= {
        "sent": sum(command == append for command in sent) / count,
        "web_connections": len(server.connections(site.web.pid)),
        "worker_connections": len(server.connections(site.worker.pid)),
    }
    result = await finish(target, ["slow"], readers, count, metrics)
    result.verdict.missing += verdict.missing
    result.verdict.duplicated += verdict.duplicated
    result.verdict.damaged += verdict.damaged
    return result


_OWN = ("info", "client|list", "ping", "config|resetstat", "monitor")
"""Commands of the benchmark itself."""


def _difference(after: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {name: calls - before.get(name, 0) for name, calls in after.items() if name not in _OWN}


def _appends(executed: dict[str, int]) -> int:
    """The commands that a producer sent, without those inside scripts."""
    scripts = executed.get("evalsha", 0) + executed.get("eval", 0)
    return scripts or executed.get("xadd", 0)


def _memory(client: redis.Redis, key: str) -> int:
    return int(cast(Any, client.memory_usage(key, samples=0)))


def _judge_stored(client: redis.Redis, stored: list[tuple[str, int]], size: int) -> Verdict:
    """Read every stream back from Redis and compare it with its source."""
    total = Verdict()
    for key, count in stored:
        seqs, damaged = _read_back(client, key, size)
        verdict = judge(seqs, count, damaged)
        total.missing += verdict.missing
        total.duplicated += verdict.duplicated
        total.damaged += verdict.damaged
    return total


def _read_back(client: redis.Redis, key: str, size: int) -> tuple[list[int], int]:
    seqs: list[int] = []
    damaged = 0
    after = "-"
    while True:
        page: Any = client.xrange(key, min=after, count=_PAGE)
        for _, fields in page:
            seq = parse_text(fields[b"d"], size)
            if seq is None:
                damaged += 1
            else:
                seqs.append(seq)
        if len(page) < _PAGE:
            return seqs, damaged
        after = f"({page[-1][0].decode()}"


_STORING = ("xadd", "xadd-pipelined", "asgi_realtime")
_FANNING = ("memory", "broadcaster", "asgi_realtime")
_PAIR = ("broadcaster", "asgi_realtime")
_RESUMING = ("memory", "asgi_realtime")

WORKLOADS = [
    Workload(
        "store-1",
        "chunks of 100 bytes from one source into Redis, until acknowledged",
        "events_per_s",
        ">= 5 x one awaited XADD per chunk",
        partial(store, streams=1, chunks=200_000, seconds=4.0),
        _STORING,
        "xadd",
        start_site,
    ),
    Workload(
        "store-1000",
        "the same from 1,000 sources at once",
        "events_per_s",
        ">= 5 x one awaited XADD per chunk",
        partial(store, streams=1000, chunks=200_000, seconds=4.0),
        _STORING,
        "xadd",
        start_site,
    ),
    Workload(
        "llm-200",
        "200 streams of 50 tokens/s from the worker to one subscriber each at the web process",
        "us_per_event",
        "all delivered, p99 <= 50 ms",
        partial(paced, streams=200, subscribers=1, rate=10_000),
        _PAIR,
        "broadcaster",
        start_site,
    ),
    Workload(
        "llm-1000",
        "the same with 1,000 streams, which overloads two CPUs",
        "us_per_event",
        "less CPU than broadcaster",
        partial(paced, streams=1000, subscribers=1, rate=50_000),
        _PAIR,
        "broadcaster",
        start_site,
    ),
    Workload(
        "fanout",
        "1 stream, 1,000 subscribers in another process, one chunk per loop iteration of the worker",
        "us_web",
        "CPU of the web process <= 1.2 x memory broker",
        partial(fan_out, subscribers=1000, burst=1),
        _FANNING,
        "memory",
        start_site,
    ),
    Workload(
        "fanout-25",
        "the same with 25 chunks/s, so that no chunks are sent together",
        "us_web",
        "CPU of the web process <= 1.2 x memory broker",
        partial(paced, streams=1, subscribers=1000, rate=25),
        _FANNING,
        "memory",
        start_site,
    ),
    Workload(
        "storm-1000",
        "1,000 subscribers of 1,000 streams disconnect and resume together; an event is a resume with 20 chunks",
        "us_web",
        "all within 2 s",
        partial(storm, streams=1000, subscribers=1),
        _RESUMING,
        "memory",
        start_site,
    ),
    Workload(
        "storm-1",
        "the same with 1,000 subscribers of one stream",
        "us_web",
        "all within 2 s",
        partial(storm, streams=1, subscribers=1000),
        _RESUMING,
        "memory",
        start_site,
    ),
]

FOOTPRINT = [
    Workload(
        "footprint",
        "bytes in Redis per chunk of 20 and of 100 bytes, commands for a single chunk, connections",
        "bytes_100",
        "1 command sent per chunk, 3 connections",
        footprint,
        ("asgi_realtime",),
        "asgi_realtime",
        start_site,
    ),
]
