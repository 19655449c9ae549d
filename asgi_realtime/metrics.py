"""Metrics in the format of Prometheus, for `Realtime(metrics=…)`. Needs the extra `metrics`.

What happens seldom (a run starts, a reader stalls) is counted when it happens. Chunks are counted by the writers and
the cursors of the subscriptions, which need that themselves, and read from them at every tick and every scrape. Bytes
are counted by a function around the `send` of each subscription, which exists only if metrics are on (`counting`).

The objects of prometheus-client store the values, so its multiprocess mode works: with `PROMETHEUS_MULTIPROC_DIR` each
worker writes files, and any of them responds with the sums. Tasks are labels, runs never are. docs/operations.md lists
the metrics.
"""

from __future__ import annotations

import os
from collections import Counter as Counts
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast
from weakref import WeakSet

import anyio

from asgi_realtime.core.errors import InvalidConfiguration, RealtimeError, shown
from asgi_realtime.core.log import StreamKey
from asgi_realtime.core.runs import StoredRecord
from asgi_realtime.engine.engine import Engine
from asgi_realtime.runs.reporter import Reporter, S, Written

try:
    from prometheus_client import CollectorRegistry as CollectorRegistry
    from prometheus_client import Counter, Gauge, Histogram
    from prometheus_client.exposition import choose_encoder
    from prometheus_client.multiprocess import MultiProcessCollector
except ImportError as exc:
    raise InvalidConfiguration(
        "metrics need prometheus-client, which is not installed: pip install 'asgi_realtime[metrics]'"
    ) from exc

MAX_TASKS = 200
"""Tasks with a label of their own, because names of open runs can be made up at run time. The others are `OTHER`."""

OTHER = "(other)"

EVENT_STREAMS = ("stream", "feed", "probe")
KINDS = (*EVENT_STREAMS, "poll")
"""Kinds of subscriptions."""

_MAX_AWAITED = 10_000
"""Runs whose first chunk is awaited."""

_FIRST_CHUNK_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_APPEND_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class _Rising:
    """Copies a total that is computed into a counter."""

    def __init__(self, counter: Any, total: Callable[[], int]) -> None:
        self._counter = counter
        self._total = total
        self._reported = 0

    def sample(self) -> None:
        total = self._total()
        if total > self._reported:
            self._counter.inc(total - self._reported)
            self._reported = total


class Metrics(Reporter):
    """The metrics of one `Realtime`, in a registry of the host or in their own. Raises `InvalidConfiguration`."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        super().__init__()
        self.registry = registry = CollectorRegistry() if registry is None else registry
        self._engine: Engine | None = None
        self._tasks: set[str] = set()
        self._awaited: dict[str, tuple[str, int]] = {}  # by run id: its task, and when it could have started
        self._writers: WeakSet[Any] = WeakSet()
        self._written = [0, 0]  # chunks and bytes of closed writers
        self._closed_writers: deque[tuple[int, int]] = deque()
        self._sent_chunks = 0  # of ended subscriptions
        self._sent_bytes = dict.fromkeys(EVENT_STREAMS, 0)
        try:
            self._register(registry)
        except ValueError as exc:
            raise InvalidConfiguration(
                "the registry has the metrics of a Realtime already; pass each Realtime a registry of its own"
            ) from exc

    def _register(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Any:
            return Counter(f"asgi_realtime_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Any:
            return Gauge(f"asgi_realtime_{name}", text, labels, registry=registry, multiprocess_mode="livesum")

        def histogram(name: str, text: str, buckets: Iterable[float], *labels: str) -> Any:
            return Histogram(f"asgi_realtime_{name}", text, labels, registry=registry, buckets=tuple(buckets))

        self._subscriptions = gauge("subscriptions", "Open subscriptions.", "kind")
        self._executing = gauge("runs_executing", "Runs that execute.", "task")
        self._runs = counter("runs_total", "Runs that have reached a status.", "task", "status")
        self._first_chunk = histogram(
            "first_chunk_seconds", "Time from the trigger of a run to its first chunk.", _FIRST_CHUNK_S, "task"
        )
        self._append = histogram("append_seconds", "Duration of calls that append chunks to a broker.", _APPEND_S)
        self._broker_errors = counter("broker_errors_total", "Calls that failed because the broker was unavailable.")
        self._stalled = counter("stalled_readers_total", "Readers that were cut because they accepted no data.")
        self._rejections = counter("rejections_total", "Requests that were answered with an error.", "reason")
        chunks_in = counter("received_chunks_total", "Chunks that were appended to streams.")
        bytes_in = counter("received_bytes_total", "JSON bytes of the chunks that were appended to streams.")
        chunks_out = counter("sent_chunks_total", "Chunks that were sent to subscriptions of streams.")
        bytes_out = counter("sent_bytes_total", "Bytes of the bodies that were sent to subscriptions.", "kind")
        self._rising = [
            _Rising(chunks_in, lambda: self._written[0] + sum(writer.chunks for writer in self._writers)),
            _Rising(bytes_in, lambda: self._written[1] + sum(writer.bytes for writer in self._writers)),
            _Rising(chunks_out, self._all_sent_chunks),
            *(_Rising(bytes_out.labels(kind), partial(self._sent_bytes.__getitem__, kind)) for kind in EVENT_STREAMS),
        ]

    # Read

    def attach(self, engine: Engine) -> None:
        """Called once, by the `Realtime`: read what the engine has open, for as long as it runs."""
        self._engine = engine
        engine.companions.append(lambda: self._keep_sampling(engine.timeouts.tick))

    async def _keep_sampling(self, interval_s: float) -> None:
        try:
            while True:
                self.sample()
                await anyio.sleep(interval_s)
        finally:
            self.sample()

    def sample(self) -> None:
        """Update what is not counted when it happens."""
        while self._closed_writers:
            chunks, size = self._closed_writers.popleft()
            self._written[0] += chunks
            self._written[1] += size
        for rising in self._rising:
            rising.sample()
        if self._engine is not None:
            kinds = Counts(getattr(one, "kind", "") for one in self._open())
            for kind in KINDS:
                self._subscriptions.labels(kind).set(kinds[kind])
            executing = Counts(self._label(execution.run.task) for execution in self._engine.executions.values())
            for task in self._tasks:
                self._executing.labels(task).set(executing[task])

    def expose(self, accept: str) -> tuple[bytes, str]:
        """The response to a scrape, and its content type."""
        self.sample()
        registry = self.registry
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        encode, content_type = choose_encoder(accept)
        return encode(registry), content_type

    def _label(self, task: str) -> str:
        if task not in self._tasks:
            if len(self._tasks) >= MAX_TASKS:
                task = OTHER
            self._tasks.add(task)
        return task

    def _all_sent_chunks(self) -> int:
        return self._sent_chunks + sum(getattr(one, "sent_chunks", 0) for one in self._open())

    def _open(self) -> Iterable[object]:
        return () if self._engine is None else self._engine.subscribers.open

    # Count

    def run_changed(self, before: StoredRecord | None, after: StoredRecord) -> None:
        super().run_changed(before, after)
        if before is not None and before.status is after.status:
            return
        task = self._label(after.task)
        self._runs.labels(task, after.status.value).inc()
        if after.is_executing:
            if len(self._awaited) >= _MAX_AWAITED:
                del self._awaited[next(iter(self._awaited))]
            self._awaited[after.id] = (task, after.delay_until_ms or after.created_at_ms)
        elif after.is_completed:
            self._awaited.pop(after.id, None)

    def writer_opened(self, writer: Written) -> None:
        self._writers.add(writer)

    def writer_closed(self, chunks: int, bytes: int) -> None:
        self._closed_writers.append((chunks, bytes))

    def appended(self, key: StreamKey, first: int, seconds: float) -> None:
        super().appended(key, first, seconds)
        self._append.observe(seconds)

    def stream_began(self, key: StreamKey) -> None:
        task, since_ms = self._awaited.pop(key.run, (None, 0)) if not key.hidden else (None, 0)
        if task is not None and self._engine is not None:
            self._first_chunk.labels(task).observe(max(0, self._engine.runs.now_ms() - since_ms) / 1000)

    def broker_failed(self) -> None:
        self._broker_errors.inc()

    def counting(self, kind: str, send: S) -> S:
        sent_bytes = self._sent_bytes

        def counted(message: Any) -> Any:  # not a coroutine function: a coroutine more would cost as much as the rest
            sent_bytes[kind] += len(message.get("body", b""))
            return send(message)

        counted.__wrapped__ = send  # type: ignore[attr-defined]  # as functools.wraps does
        return cast(S, counted)

    def subscription_ended(self, chunks: int) -> None:
        self._sent_chunks += chunks

    def reader_stalled(self, kind: str, run_id: str, seconds: float) -> None:
        super().reader_stalled(kind, run_id, seconds)
        self._stalled.inc()

    def rejected(self, error: RealtimeError, request: str) -> None:
        super().rejected(error, request)
        self._rejections.labels(error.code).inc()


def make_metrics(registry: object) -> Metrics:
    """The metrics for `Realtime(metrics=…)`. Raises `InvalidConfiguration`."""
    if registry is True:
        return Metrics()
    if not isinstance(registry, CollectorRegistry):
        raise InvalidConfiguration(f"metrics is {shown(registry)}; allowed are True, False and a CollectorRegistry")
    return Metrics(registry)
