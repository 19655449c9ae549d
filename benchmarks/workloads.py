"""The workloads: what is opened, what is published, what is measured.

Each takes a fresh server and the size of the run, and returns one `Result`. Nothing here knows which server it drives.
All are bounded in count and in time; a server that is too slow for the count is measured on what it did.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial

from benchmarks.client import (
    Subscriber,
    Transcript,
    Verdict,
    close_subscribers,
    latencies_ms,
    open_subscribers,
    verify,
)
from benchmarks.process import Target, run_server
from benchmarks.servers import PEERS

WINDOW = 256
"""Chunks that a closed-loop producer may be ahead of the slowest subscriber."""
_SAMPLED = 20
"""Subscribers of one stream whose latencies are taken."""
_WARM_UP = 64
_IN_TIME_S = 0.05
"""The latency that is allowed: what comes within it after the last chunk was due counts as delivered in time."""
_STALLED_S = 2.0
"""If a server neither sends nor computes for so long, what has not come is missing."""


@dataclass(slots=True)
class Result:
    """One workload on one server, once."""

    metrics: dict[str, float]
    verdict: Verdict = field(default_factory=Verdict)
    unfinished: int = 0
    """Subscribers whose response did not end cleanly after the stream ended."""

    @property
    def failed(self) -> bool:
        return bool(self.verdict) or self.unfinished > 0


def start_server(peer: str, server_cpu: int) -> AbstractAsyncContextManager[Target]:
    """One peer's server, on a CPU of its own."""
    return run_server(PEERS[peer], cpus=[server_cpu])


@dataclass(frozen=True, slots=True)
class Workload:
    """A workload, the figure that compares servers in it, and what asgi_realtime must reach."""

    name: str
    title: str
    metric: str
    goal: str
    """What this library is to reach; printed, not enforced."""
    run: Callable[[Target, bool], Awaitable[Result]]
    peers: Sequence[str] = tuple(PEERS)
    """Whom it compares."""
    baseline: str = next(iter(PEERS))
    start: Callable[[str, int], AbstractAsyncContextManager[Target]] = start_server
    """Makes what is driven, from the peer's name and the CPU for it."""


async def fan_out(server: Target, quick: bool, *, subscribers: int, burst: int) -> Result:
    """One stream, many subscribers, as fast as the slowest of them."""
    seconds, count = (1.0, 320) if quick else (6.0, 2000 * burst)
    readers = await open_readers(server, ["fanout"], 100 if quick else subscribers)
    with quiet_client():
        async with _acknowledging(server, readers):
            warm = await server.call("produce", stream="fanout", count=_WARM_UP, burst=burst, window=WINDOW, seconds=5)
            await receive_all(server, readers, warm)
            meter = Meter(server)
            total = await server.call(
                "produce", stream="fanout", count=count, burst=burst, window=WINDOW, seconds=seconds
            )
            await receive_all(server, readers, total)
        metrics = meter.read(last_arrival(readers))
    metrics |= per_event(metrics, (total - warm) * len(readers)) | _latency(readers, skip=warm)
    return await finish(server, ["fanout"], readers, total, metrics)


async def paced(server: Target, quick: bool, *, streams: int, subscribers: int, rate: float) -> Result:
    """Chunks that come at their own pace, whether or not the server keeps up: the honest latency."""
    seconds, drain_s = (1.0, 5.0) if quick else (5.0, 15.0)
    if quick:
        subscribers = max(1, subscribers // 10)
        streams, rate = (1, rate) if streams == 1 else (streams // 10, rate / 10)
    names = [f"s{number}" for number in range(streams)]
    readers = await open_readers(server, names, subscribers)
    each = int(seconds * rate / streams)
    seconds = each * streams / rate
    with quiet_client():
        # A chunk each first, so that every subscriber waits for the next when the clock starts.
        await server.call("pace", streams=names, rate=rate, count=streams, start_ns=time.monotonic_ns())
        await receive_all(server, readers, 1)
        meter = Meter(server, start_ns=time.monotonic_ns() + 100_000_000)
        server.tell("pace", streams=names, rate=rate, count=each * streams, start_ns=meter.start_ns)
        await asyncio.sleep((meter.start_ns - time.monotonic_ns()) / 1e9 + seconds)
        window = meter.read(time.monotonic_ns())
        await asyncio.sleep(_IN_TIME_S)
        positions = [reader.position for reader in readers]
        complete = await receive_all(server, readers, 1 + each, give_up_s=drain_s)
        metrics = meter.read(last_arrival(readers))
    if complete:
        await server.answer()
    in_time = sum(reader.transcript.count_to(position) - 1 for reader, position in zip(readers, positions, strict=True))
    metrics |= per_event(metrics, sum(reader.received() - 1 for reader in readers)) | _latency(readers, skip=1)
    metrics |= {
        "events_per_s": in_time / seconds,
        "delivered": in_time / (each * len(readers)),
        **{name: value for name, value in window.items() if name.endswith("_cpu")},
    }
    return await finish(server, names, readers, 1 + each if complete else None, metrics)


async def idle(server: Target, quick: bool, *, subscribers: int) -> Result:
    """Subscribers that wait: what each costs to open and to keep."""
    count = 500 if quick else subscribers
    [subscription] = await server.call("create", streams=["idle"])

    def make(number: int) -> list[Subscriber]:
        transcript = Transcript()
        return [Subscriber(subscription["path"], subscription["tokens"][0], transcript) for _ in range(number)]

    # What the first ones import and allocate is no cost of a subscriber.
    await close_subscribers(await open_subscribers(server.port, make(200)))
    await asyncio.sleep(0.5)
    memory, cpu_s = server.memory_kib(), sum(server.cpu_s().values())
    readers = await open_subscribers(server.port, make(count))
    await asyncio.sleep(0.5)
    opened_s = sum(server.cpu_s().values()) - cpu_s
    metrics = {"kib": (server.memory_kib() - memory) / count, "us_per_open": opened_s * 1e6 / count}
    meter = Meter(server)
    await asyncio.sleep(0.5 if quick else 2)
    metrics |= meter.read(time.monotonic_ns())
    lost = sum(reader.closed for reader in readers)
    result = await finish(server, ["idle"], readers, 0, metrics)
    result.unfinished += lost
    return result


async def catch_up(server: Target, quick: bool) -> Result:
    """A late subscriber reads all that is stored; several times, since once is over in milliseconds."""
    count, rounds = (10_000, 3) if quick else (100_000, 5)
    [subscription] = await server.call("create", streams=["stored"])
    total = await server.call("produce", stream="stored", count=count, burst=500, window=count, seconds=30)
    await server.call("end", streams=["stored"])
    await asyncio.sleep(0.2)
    readers: list[Subscriber] = []
    measured: list[dict[str, float]] = []
    with quiet_client():
        for _ in range(rounds):
            reader = Subscriber(subscription["path"], subscription["tokens"][0], Transcript())
            meter = Meter(server)
            await open_subscribers(server.port, [reader])
            await _wait_until(lambda: reader.ended, server, [reader], give_up_s=60)  # noqa: B023
            measured.append(meter.read(reader.last_ns))
            readers.append(reader)
    metrics = {name: statistics.median(each[name] for each in measured) for name in measured[0]}
    metrics |= per_event(metrics, total)
    return await finish(server, [], readers, total, metrics)


async def subscribe(server: Target, quick: bool, *, distinct: bool) -> Result:
    """Connections that are opened, get the one stored chunk, and leave: a new token each, or all the same."""
    count = 200 if quick else 2000
    [subscription] = await server.call("create", streams=["one"], tokens=count + 1 if distinct else 1)
    await server.call("produce", stream="one", count=1, burst=1, window=1, seconds=5)
    readers: list[Subscriber] = []
    transcript = Transcript()
    tokens = iter(subscription["tokens"] if distinct else subscription["tokens"] * (count + 1))

    async def visit() -> None:
        for token in tokens:
            reader = Subscriber(subscription["path"], token, transcript)
            await open_subscribers(server.port, [reader])
            await asyncio.wait_for(reader.started, 10)
            await close_subscribers([reader])
            readers.append(reader)
            if len(readers) > count:
                return

    await open_subscribers(server.port, [first := Subscriber(subscription["path"], next(tokens), transcript)])
    await asyncio.wait_for(first.started, 10)
    with quiet_client():
        meter = Meter(server)
        await asyncio.gather(*(visit() for _ in range(16)))
        await asyncio.sleep(0.05)  # The server's part of the last disconnects.
        metrics = meter.read(last_arrival(readers))
    metrics |= per_event(metrics, len(readers))
    metrics["us_per_open"] = metrics.pop("us_per_event")
    await close_subscribers([first])
    return await finish(server, [], [first, *readers], 1, metrics)


class Meter:
    """CPU of each process, of the client and of whoever else disturbs, and the wall clock, until `read`."""

    def __init__(self, server: Target, *, start_ns: int | None = None) -> None:
        self._server = server
        self.start_ns = time.monotonic_ns() if start_ns is None else start_ns
        self._server_s, self._client_s, self._others_s = server.cpu_s(), time.process_time(), server.others_s()

    def read(self, end_ns: int) -> dict[str, float]:
        wall_s = max(end_ns - self.start_ns, 1) / 1e9
        metrics = {"wall_s": wall_s}
        for name, used_s in self._server.cpu_s().items():
            metrics[f"{name}_s"] = used_s - self._server_s[name]
            metrics[f"{name}_cpu"] = metrics[f"{name}_s"] / wall_s
        metrics["client_cpu"] = (time.process_time() - self._client_s) / wall_s
        metrics["others_cpu"] = max(0.0, self._server.others_s() - self._others_s) / wall_s
        return metrics


PROCESSES = ("server", "web", "worker", "redis")


def per_event(metrics: dict[str, float], events: int) -> dict[str, float]:
    """The rate, and the CPU of each process for one event, in microseconds; `us` is that of all together."""
    used = {name: metrics[f"{name}_s"] * 1e6 / max(events, 1) for name in PROCESSES if f"{name}_s" in metrics}
    figures = {"events": events, "events_per_s": events / metrics["wall_s"], "us_per_event": sum(used.values())}
    return figures | {f"us_{name}": value for name, value in used.items() if name != "server"}


def _latency(readers: list[Subscriber], *, skip: int) -> dict[str, float]:
    times = latencies_ms(readers, skip=skip)
    if not times:
        return {}
    return {"p50_ms": times[len(times) // 2], "p99_ms": times[min(len(times) - 1, len(times) * 99 // 100)]}


async def open_readers(server: Target, names: list[str], subscribers: int) -> list[Subscriber]:
    """Create the streams and subscribe to each, so many times. The latencies of some subscribers are sampled."""
    readers: list[Subscriber] = []
    step = max(1, subscribers // _SAMPLED)
    for subscription in await server.call("create", streams=names):
        transcript = Transcript()
        readers += [
            Subscriber(subscription["path"], subscription["tokens"][0], transcript, sampled=number % step == 0)
            for number in range(subscribers)
        ]
    return await open_subscribers(server.port, readers)


async def finish(
    server: Target, streams: list[str], readers: list[Subscriber], expected: int | None, metrics: dict[str, float]
) -> Result:
    """End the streams, see every response end cleanly, and judge every byte that came."""
    unfinished = 0
    if streams and expected is not None:
        await server.call("end", streams=streams)
        await _wait_until(lambda: all(reader.ended for reader in readers), server, readers, give_up_s=10)
        unfinished = sum(not reader.ended for reader in readers)
    await close_subscribers(readers)
    return Result(metrics, verify(readers, expected), unfinished)


async def receive_all(server: Target, readers: list[Subscriber], total: int, *, give_up_s: float = 60.0) -> bool:
    """Wait until every subscriber has `total` chunks or nothing comes any more; False if it would take longer."""
    behind = list(readers)

    def complete() -> bool:
        while behind and behind[-1].received() >= total:
            behind.pop()
        return not behind

    return await _wait_until(complete, server, readers, give_up_s=give_up_s)


async def _wait_until(
    condition: Callable[[], bool], server: Target, readers: list[Subscriber], *, give_up_s: float
) -> bool:
    """Wait for the condition or for a silence of an idle server; False if neither came in time."""
    deadline = time.monotonic() + give_up_s
    checked, cpu_s, arrival = time.monotonic(), sum(server.cpu_s().values()), 0
    while not condition():
        now = time.monotonic()
        if now > deadline:
            return False
        if now - checked > _STALLED_S:
            # An overloaded server may be silent for long, but it is not idle.
            used_s = sum(server.cpu_s().values())
            if used_s - cpu_s < 0.1 and arrival == last_arrival(readers):
                return True
            checked, cpu_s, arrival = now, used_s, last_arrival(readers)
        await asyncio.sleep(0.002)
    return True


def last_arrival(readers: list[Subscriber]) -> int:
    return max(max(reader.last_ns, reader.requested_ns) for reader in readers)


@asynccontextmanager
async def _acknowledging(server: Target, readers: list[Subscriber]) -> AsyncIterator[None]:
    """Tell the producer what the slowest subscriber has, as long as the block lasts."""

    async def acknowledge() -> None:
        told = 0
        while True:
            await asyncio.sleep(0.001)
            slowest = min(readers, key=_progress)
            count = slowest.received()
            if count >= told + WINDOW // 8:
                server.tell("acknowledge", count=count)
                told = count

    task = asyncio.create_task(acknowledge())
    try:
        yield
    finally:
        task.cancel()


def _progress(reader: Subscriber) -> int:
    return reader.position if reader.own is None else reader.position + len(reader.own)


@contextmanager
def quiet_client() -> Iterator[None]:
    """Keep the client's garbage collector out of the measurement; the server's stays as it is."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


WORKLOADS = [
    Workload(
        "fanout",
        "1 stream, 1,000 subscribers, one chunk per loop turn",
        "us_per_event",
        "CPU <= 1.15 x raw",
        partial(fan_out, subscribers=1000, burst=1),
    ),
    Workload(
        "burst",
        "1 stream, 100 subscribers, 32 chunks per loop turn",
        "us_per_event",
        "CPU <= 0.15 x raw",
        partial(fan_out, subscribers=100, burst=32),
    ),
    Workload(
        "paced",
        "1 stream, 1,000 subscribers, 400 chunks/s whether or not they keep up",
        "us_per_event",
        "delivered >= 99 %, p99 <= 50 ms",
        partial(paced, streams=1, subscribers=1000, rate=400),
    ),
    Workload(
        "llm",
        "1,000 streams of 50 tokens/s, one subscriber each",
        "us_per_event",
        "CPU <= 1.3 x raw, p99 <= 20 ms",
        partial(paced, streams=1000, subscribers=1, rate=50_000),
    ),
    Workload("idle", "5,000 idle subscribers", "kib", "<= 15 KiB", partial(idle, subscribers=5000)),
    Workload("catchup", "100,000 stored chunks to one late subscriber", "events_per_s", ">= 8 x raw", catch_up),
    Workload(
        "subscribe",
        "connect, token check, one chunk, leave; a new token each time",
        "us_per_open",
        "CPU <= 1.4 x raw",
        partial(subscribe, distinct=True),
    ),
    Workload(
        "resubscribe",
        "the same with one token, as after a dropped connection",
        "us_per_open",
        "CPU <= 1.4 x raw",
        partial(subscribe, distinct=False),
    ),
]
