"""The workloads: what each opens, publishes and measures.

Each takes a fresh server and the size of the run and returns one `Result`, without knowing which server it drives. All
are bounded in count and in time; a server that is too slow for the count is measured by what it did.
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
from benchmarks.servers import IN_PROCESS_PEERS, PEERS, TOKEN_PEERS

WINDOW = 256
"""How many chunks a closed-loop producer can be ahead of the slowest subscriber."""
_SAMPLED = 20
"""Subscribers of one stream with recorded latencies."""
_WARM_UP = 64
_IN_TIME_S = 0.05
"""The allowed latency: chunks that arrive this soon after the last one was due count as delivered in time."""
_STALLED_S = 2.0
"""If a server neither sends nor computes for this long, chunks that have not arrived are missing."""


@dataclass(slots=True)
class Result:
    """The result of one workload on one server."""

    metrics: dict[str, float]
    verdict: Verdict = field(default_factory=Verdict)
    unfinished: int = 0
    """Subscribers with a response that did not end cleanly after the stream ended."""

    @property
    def failed(self) -> bool:
        return bool(self.verdict) or self.unfinished > 0


def start_server(peer: str, server_cpu: int) -> AbstractAsyncContextManager[Target]:
    """Start the server of one peer on its own CPU."""
    return run_server(IN_PROCESS_PEERS[peer], cpus=[server_cpu])


@dataclass(frozen=True, slots=True)
class Workload:
    """A workload, its main figure, and the goal for asgi_realtime."""

    name: str
    title: str
    metric: str
    goal: str
    """What this library should reach; printed, not enforced."""
    run: Callable[[Target, bool], Awaitable[Result]]
    peers: Sequence[str] = tuple(PEERS)
    """The servers to compare."""
    baseline: str = next(iter(PEERS))
    start: Callable[[str, int], AbstractAsyncContextManager[Target]] = start_server
    """Starts the target, given the name of the peer and its CPU."""


async def fan_out(server: Target, quick: bool, *, subscribers: int, burst: int) -> Result:
    """One stream with many subscribers, as fast as the slowest of them."""
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
    """Chunks at a fixed rate, whether or not the server keeps up, so that latencies include its backlog."""
    seconds, drain_s = (1.0, 5.0) if quick else (5.0, 15.0)
    if quick:
        subscribers = max(1, subscribers // 10)
        streams, rate = (1, rate) if streams == 1 else (streams // 10, rate / 10)
    names = [f"s{number}" for number in range(streams)]
    readers = await open_readers(server, names, subscribers)
    each = int(seconds * rate / streams)
    seconds = each * streams / rate
    with quiet_client():
        # Send one chunk to each first, so that every subscriber waits for the next when the clock starts.
        await server.call("pace", streams=names, rate=rate, count=streams, start_ns=time.monotonic_ns())
        await receive_all(server, readers, 1)
        meter = Meter(server, start_ns=time.monotonic_ns() + 100_000_000)
        server.send("pace", streams=names, rate=rate, count=each * streams, start_ns=meter.start_ns)
        await asyncio.sleep((meter.start_ns - time.monotonic_ns()) / 1e9 + seconds)
        window = meter.read(time.monotonic_ns())
        await asyncio.sleep(_IN_TIME_S)
        positions = [reader.position for reader in readers]
        complete = await receive_all(server, readers, 1 + each, give_up_s=drain_s)
        metrics = meter.read(last_arrival(readers))
    if complete:
        await server.receive()
    in_time = sum(reader.transcript.count_to(position) - 1 for reader, position in zip(readers, positions, strict=True))
    metrics |= per_event(metrics, sum(reader.received() - 1 for reader in readers)) | _latency(readers, skip=1)
    metrics |= {
        "events_per_s": in_time / seconds,
        "delivered": in_time / (each * len(readers)),
        **{name: value for name, value in window.items() if name.endswith("_cpu")},
    }
    return await finish(server, names, readers, 1 + each if complete else None, metrics)


async def idle(server: Target, quick: bool, *, subscribers: int) -> Result:
    """Waiting subscribers: what each costs to open and to hold."""
    count = 500 if quick else subscribers
    [subscription] = await server.call("create", streams=["idle"])

    def make(number: int) -> list[Subscriber]:
        transcript = Transcript()
        return [Subscriber(subscription["path"], subscription["tokens"][0], transcript) for _ in range(number)]

    # One-time imports and allocations are not a cost per subscriber.
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
    """A late subscriber reads everything that is stored, several times, because once takes milliseconds."""
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
    """Connections that open, receive the one stored chunk and close, each with a new token or all with the same."""
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
        await asyncio.sleep(0.05)  # the server handles the last disconnects
        metrics = meter.read(last_arrival(readers))
    metrics |= per_event(metrics, len(readers))
    metrics["us_per_open"] = metrics.pop("us_per_event")
    await close_subscribers([first])
    return await finish(server, [], [first, *readers], 1, metrics)


async def in_process(server: Target, quick: bool, *, streams: int) -> Result:
    """Streams with one reader each, driven inside the server's process without sockets."""
    size = {"streams": 50, "tokens": 10, "segments": 1} if quick else {"streams": streams, "tokens": 3, "segments": 60}
    return Result({"us_per_event": await server.call("measure", **size)})


class Meter:
    """Measures the CPU time of each process, of the client and of unrelated processes, and the wall time."""

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
    """The rate, and the CPU time of each process and of all together per event, in microseconds."""
    used = {name: metrics[f"{name}_s"] * 1e6 / max(events, 1) for name in PROCESSES if f"{name}_s" in metrics}
    figures = {"events": events, "events_per_s": events / metrics["wall_s"], "us_per_event": sum(used.values())}
    return figures | {f"us_{name}": value for name, value in used.items() if name != "server"}


def _latency(readers: list[Subscriber], *, skip: int) -> dict[str, float]:
    times = latencies_ms(readers, skip=skip)
    if not times:
        return {}
    return {"p50_ms": times[len(times) // 2], "p99_ms": times[min(len(times) - 1, len(times) * 99 // 100)]}


async def open_readers(server: Target, names: list[str], subscribers: int) -> list[Subscriber]:
    """Create the streams and open this many subscribers of each. Some of them record latencies."""
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
    """End the streams, check that every response ends cleanly, and verify every byte."""
    unfinished = 0
    if streams and expected is not None:
        await server.call("end", streams=streams)
        await _wait_until(lambda: all(reader.ended for reader in readers), server, readers, give_up_s=10)
        unfinished = sum(not reader.ended for reader in readers)
    await close_subscribers(readers)
    return Result(metrics, verify(readers, expected), unfinished)


async def receive_all(server: Target, readers: list[Subscriber], total: int, *, give_up_s: float = 60.0) -> bool:
    """Wait until every subscriber has `total` chunks or no more arrive; False on timeout."""
    incomplete = list(readers)

    def complete() -> bool:
        while incomplete and incomplete[-1].received() >= total:
            incomplete.pop()
        return not incomplete

    return await _wait_until(complete, server, readers, give_up_s=give_up_s)


async def _wait_until(
    condition: Callable[[], bool], server: Target, readers: list[Subscriber], *, give_up_s: float
) -> bool:
    """Wait for the condition, or until the server is silent and idle; False on timeout."""
    deadline = time.monotonic() + give_up_s
    checked, cpu_s, arrival = time.monotonic(), sum(server.cpu_s().values()), 0
    while not condition():
        now = time.monotonic()
        if now > deadline:
            return False
        if now - checked > _STALLED_S:
            # An overloaded server can be silent for long, but it is not idle.
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
    """During the block, report the progress of the slowest subscriber to the producer."""

    async def acknowledge() -> None:
        reported = 0
        while True:
            await asyncio.sleep(0.001)
            slowest = min(readers, key=_progress)
            count = slowest.received()
            if count >= reported + WINDOW // 8:
                server.send("acknowledge", count=count)
                reported = count

    task = asyncio.create_task(acknowledge())
    try:
        yield
    finally:
        task.cancel()


def _progress(reader: Subscriber) -> int:
    return reader.position if reader.own is None else reader.position + len(reader.own)


@contextmanager
def quiet_client() -> Iterator[None]:
    """Disable the client's garbage collector during the measurement; the server's stays enabled."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


WORKLOADS = [
    Workload(
        "fanout",
        "1 stream, 1,000 subscribers, one chunk per loop iteration",
        "us_per_event",
        "CPU <= 0.62 x raw",
        partial(fan_out, subscribers=1000, burst=1),
    ),
    Workload(
        "burst",
        "1 stream, 100 subscribers, 32 chunks per loop iteration",
        "us_per_event",
        "CPU <= 0.05 x raw",
        partial(fan_out, subscribers=100, burst=32),
    ),
    Workload(
        "paced",
        "1 stream, 1,000 subscribers, 400 chunks/s whether or not they keep up",
        "us_per_event",
        "delivered >= 99 %, p99 <= 33 ms",
        partial(paced, streams=1, subscribers=1000, rate=400),
    ),
    Workload(
        "llm",
        "1,000 streams of 50 tokens/s, one subscriber each",
        "us_per_event",
        "CPU <= 1.3 x raw, p99 <= 3 x raw",
        partial(paced, streams=1000, subscribers=1, rate=50_000),
    ),
    Workload("idle", "5,000 idle subscribers", "kib", "<= 12.5 KiB", partial(idle, subscribers=5000)),
    Workload("catchup", "100,000 stored chunks to one late subscriber", "events_per_s", ">= 20 x raw", catch_up),
    Workload(
        "subscribe",
        "connect, check a token, receive one chunk, disconnect; a new token each time",
        "us_per_open",
        "CPU <= 1.3 x raw",
        partial(subscribe, distinct=True),
    ),
    Workload(
        "resubscribe",
        "the same with one token, as after a dropped connection",
        "us_per_open",
        "CPU <= 0.9 x raw",
        partial(subscribe, distinct=False),
    ),
]

TOKENS = [
    Workload(
        "in-process",
        "500 streams, one reader each, one token per loop iteration, without sockets",
        "us_per_event",
        "CPU <= 2.5 x raw; metrics <= 2 % more",
        partial(in_process, streams=500),
        peers=tuple(peer for peer in IN_PROCESS_PEERS if peer != "fastapi"),  # it takes 20 times as long
    ),
    Workload(
        "tokens-200",
        "200 streams of 50 tokens/s, one subscriber each",
        "us_per_event",
        "CPU of append <= 1.35 x raw, of pipe <= 1.35 x raw source",
        partial(paced, streams=200, subscribers=1, rate=10_000),
        peers=tuple(TOKEN_PEERS),
    ),
    Workload(
        "tokens-1000",
        "1,000 streams of 50 tokens/s, one subscriber each",
        "us_per_event",
        "CPU of append <= 1.3 x raw, of pipe <= 1.3 x raw source; p99 <= 3 x raw",
        partial(paced, streams=1000, subscribers=1, rate=50_000),
        peers=tuple(peer for peer in TOKEN_PEERS if peer != "fastapi"),  # it cannot keep up with a third of them
    ),
]
"""The everyday job: one reader per stream. `pipe` reads a source, so compare it with `raw source`: the raw app with a
task that reads the same source."""
