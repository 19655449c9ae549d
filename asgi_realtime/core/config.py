"""Settings as small values with named defaults, and the only parser of time spans.

Sizes are in bytes, times in seconds. Invalid values raise an error here, not where they are used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import TypeVar

from asgi_realtime.core.errors import InvalidConfiguration, UsageError, shown
from asgi_realtime.core.origins import normalize_origin

Span = float | int | str | timedelta
"""A time span: seconds, a `timedelta`, or text such as `"90s"`, `"15m"`, `"1h30m"`, `"2d"`."""

MAX_SPAN_S = 10 * 366 * 86400
"""Ten years, the longest span."""

S = TypeVar("S")

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "hr": 3600.0, "d": 86400.0, "w": 604800.0}
_SPAN = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|s|m|hr|h|d|w))+")
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|hr|h|d|w)")


def parse_span(value: Span, *, name: str = "span") -> float:
    """Return a span in seconds. Raises `UsageError` if it is malformed, not finite or not positive."""
    if isinstance(value, timedelta):
        seconds = value.total_seconds()
    elif isinstance(value, str):
        text = value.strip().lower()
        if not _SPAN.fullmatch(text):
            raise UsageError(
                f"{name} is {shown(value)}; allowed are seconds, a timedelta, or text like '90s', '15m', '1h30m'"
            )
        seconds = sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(text))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(max(-1, min(value, MAX_SPAN_S)))  # an int can be too large for a float
    else:
        raise UsageError(f"{name} is a {type(value).__name__}; allowed are seconds, a timedelta, or text like '15m'")
    if not 0 < seconds < MAX_SPAN_S:
        text = shown(value) if isinstance(value, str) else repr(value)
        raise UsageError(f"{name} is {text}; it must be more than zero and less than ten years")
    return seconds


class _Positive:
    """Rejects every field that is not above zero."""

    __slots__ = ()

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise InvalidConfiguration(
                    f"{type(self).__name__}.{field.name} is {value!r}; it must be a number above 0"
                )


def settings_or_default(value: S | None, kind: type[S]) -> S:
    """The settings, or the defaults for None. Raises `InvalidConfiguration` for a value of another type."""
    if value is None:
        return kind()
    if not isinstance(value, kind):
        name = kind.__name__
        raise InvalidConfiguration(f"{name.lower()} is {shown(value)}; allowed is {name}(…)")
    return value


def check_switch(value: bool, *, name: str) -> bool:
    """Raises `InvalidConfiguration` unless the value is True or False: `"0"` in a variable of the environment is not
    False."""
    if not isinstance(value, bool):
        raise InvalidConfiguration(f"{name} is {shown(value)}; allowed are True and False")
    return value


@dataclass(frozen=True, slots=True)
class Limits(_Positive):
    """Limits. Exceeding one raises `LimitExceeded`, which names it."""

    chunk_bytes: int = 1024 * 1024
    """One chunk, encoded."""
    payload_bytes: int = 3 * 1024 * 1024
    """One payload, encoded."""
    output_bytes: int = 10 * 1024 * 1024
    metadata_bytes: int = 256 * 1024
    """The whole metadata of one run, encoded."""
    append_bytes: int = 512 * 1024
    """The text of one append over HTTP."""
    input_bytes: int = 1024 * 1024
    tags: int = 10
    tag_length: int = 128
    key_length: int = 128
    """Stream keys, input ids, task ids, threads, in characters."""
    idempotency_key_length: int = 512
    batch_runs: int = 1000
    batch_bytes: int = 32 * 1024 * 1024
    """All items of a batch, in one HTTP request."""
    streams_per_run: int = 100
    inputs_per_run: int = 100
    """Input ids used in one run."""
    inputs_bytes: int = 8 * 1024 * 1024
    """All messages sent into one run, each with 256 bytes for storing it. Inputs are never trimmed; a message beyond
    the limit is rejected."""
    feed_runs: int = 1000
    """Runs in the snapshot of one feed; the newest ones."""
    topic_runs: int = 10_000
    """Runs that one tag or batch remembers; the newest ones."""
    pipe_buffer: int = 10_000
    """Chunks in the local copy of a `Pipe`."""
    pending_bytes: int = 1024 * 1024
    """Bytes of one `Pipe` that can wait for the broker's acknowledgement before its source pauses."""
    source_threads: int = 64
    """Threads that read sync iterables, per process."""
    task_threads: int = 64
    """Threads that run `def` tasks, per process."""
    on_end_calls: int = 32
    """Calls of `on_end` functions at a time in this process; the others wait. Each can need a database connection."""
    task_concurrency: int = 1000
    """Runs of one task that execute at once in this process, unless the task sets its own limit."""
    subscribers: int = 20_000
    """Subscriptions open at once in this process."""
    subscribers_per_run: int = 10_000
    subscribers_per_owner: int = 10_000
    """Subscriptions that one owner has open at once in this process, and never more than are still free. The owner of
    a public token is the `owner` it was created with, or the token itself."""
    bodies_per_owner: int = 100
    """Requests with a body (POST, PUT) that one owner has open at once in this process."""
    body_bytes_per_owner: int = 64 * 1024 * 1024
    """The bodies of these requests together, by their `Content-Length` or by what has arrived. One body of any allowed
    size is always accepted."""
    open_runs_per_owner: int = 100
    """Runs that one owner triggered with public tokens and that have not ended."""
    runs_per_minute_per_owner: int = 300
    runs_per_owner: int = 500
    """Runs of one owner that are retained, and never more than half of `feed_runs` or `topic_runs`, so that they cannot
    crowd others out of a feed. Beyond, its runs that ended longest ago are removed before `Retention.after_end`."""
    bytes_per_owner: int = 64 * 1024 * 1024
    """Payloads, metadata, outputs and inputs of the runs of one owner. Its runs that ended longest ago are removed
    first; what open runs hold beyond the limit is rejected."""
    delay_per_owner: float = 30 * 24 * 3600.0
    """The longest `delay`, in seconds, of a run that is triggered with a public token."""
    token_life: float = 30 * 24 * 3600.0
    """The longest lifetime, in seconds, of a token."""
    mirror_bytes: int = 1024 * 1024
    """Chunks of each followed stream that this process holds if the broker is remote. Older chunks are read from the
    broker."""


@dataclass(frozen=True, slots=True)
class Retention(_Positive):
    """How much is retained, and for how long."""

    def __post_init__(self) -> None:
        _Positive.__post_init__(self)
        if self.host_share > 1:
            raise InvalidConfiguration(f"Retention.host_share is {self.host_share!r}; it must be at most 1")

    stream_bytes: int = 8 * 1024 * 1024
    """Per stream. The oldest chunks are trimmed first; a reader that has not received them gets a `gap`."""
    total_bytes: int = 512 * 1024 * 1024
    """Memory that the memory broker uses: runs, tags, claims, chunks, inputs, and the objects around them. When it is
    full, the runs that ended longest ago are removed. Unfinished runs lose nothing, so if they fill it, new runs,
    chunks and inputs are rejected."""
    host_share: float = 0.25
    """The part of `total_bytes` that runs triggered with public tokens never use. Within the rest, the owner that holds
    the most loses its ended runs first, and then only owners are rejected."""
    after_end: float = 24 * 3600.0
    """How long a run and its streams are retained after the run ends."""
    idempotency_key: float = 24 * 3600.0
    """How long an idempotency key maps to its run, unless set per run. The mapping never outlives the run."""
    request_key: float = 600.0
    """How long a request that a client repeats, because the response was lost, returns the run that it created."""
    batch: float = 3600.0
    """How long a batch created over HTTP waits for its items. A batch with an idempotency key waits for as long as the
    key is valid."""


@dataclass(frozen=True, slots=True)
class Timeouts(_Positive):
    """How long operations can take."""

    def __post_init__(self) -> None:
        _Positive.__post_init__(self)
        if self.stream_age < self.heartbeat:
            raise InvalidConfiguration(
                f"Timeouts.stream_age is {self.stream_age!r}; it must be at least heartbeat, {self.heartbeat!r}:"
                " a quiet stream would end before its first heartbeat"
            )

    heartbeat: float = 15.0
    """Silence on a subscription before a heartbeat is sent."""
    poll: float = 20.0
    """How long a poll of the official clients is held while nothing changes, within 15 %."""
    receive: float = 30.0
    """Silence of a client that is sending a request body."""
    body: float = 120.0
    """A whole request body, except that of a writer, which lasts as long as its source."""
    send: float = 30.0
    """One send to a subscriber that does not read. It is disconnected then, and can resume."""
    append: float = 30.0
    """How long writers and other calls retry while the broker is unavailable."""
    writer: float = 16 * 60.0
    """Silence of a writer over HTTP before its request ends. The official client starts a new one after 15 minutes."""
    broker: float = 5.0
    """One response of a remote broker, or one connection attempt. Then it counts as unavailable."""
    drain: float = 10.0
    """How long runs can continue after the shutdown has begun, with their readers. The server exits as soon as no run
    executes. After SIGINT, after a second signal, and under a reloader it is half a second at most."""
    cancel: float = 5.0
    """How long the owner of a run can take to cancel it. Then any process does."""
    close: float = 5.0
    """How long closing a source can take."""
    find: float = 5.0
    """How long a request waits for a run that its token names and that does not exist yet, and a new run for one that
    holds its thread and does not exist yet."""
    appear: float = 600.0
    """How long after a token was created an `EventSource` continues to wait for such a run, by reconnecting: the run
    can be waiting in a job queue."""
    lease: float = 30.0
    """How long the owner of a run can be silent before the run becomes CRASHED."""
    tick: float = 0.5
    """The period of the ticker, and so the precision of heartbeats, expiry, delays and timeouts."""
    authorize: float = 10.0
    """How long `Realtime(authorize=…)` can take for one request."""
    session: float = 15 * 60.0
    """The maximum age of a subscription that `authorize` allowed, less up to 15 %. It is then closed as with
    `stream_age`, and `authorize` is asked again when the client resumes."""
    stream_age: float = math.inf
    """The maximum age of a subscription, less up to 15 % so that subscriptions opened together do not end together. It
    is then closed as during shutdown, and the client resumes. This rebalances connections and exercises the deploy path
    continuously."""


EXPOSED_HEADERS = (
    "electric-handle",
    "electric-offset",
    "electric-schema",
    "electric-cursor",
    "electric-up-to-date",
    "x-trigger-jwt",
    "x-trigger-jwt-claims",
    "x-stream-version",
    "x-ratelimit-reset",
    "retry-after",
    "x-should-retry",
    "x-realtime-resume",
)
"""The response headers that a page of another origin must be able to read, for hosts that use their own CORS
middleware."""


@dataclass(frozen=True, slots=True)
class Cors:
    """The other origins whose pages can read: `"*"`, or a list such as `["https://app.example"]`.

    Tokens are sent in a header or the query and never as cookies, so the default `"*"` is safe. With
    `Realtime(authorize=…)`, pages of origins that are listed by name can also use the user's session. Capitals, a
    default port and a trailing slash are normalized; a wildcard within an origin, or a path, raises
    `InvalidConfiguration`.
    """

    origins: Sequence[str] | str = "*"
    max_age: int = 300

    def __post_init__(self) -> None:
        if type(self.max_age) is not int or self.max_age < 0:
            raise InvalidConfiguration(f"Cors.max_age is {self.max_age!r}; it must be a whole number of seconds from 0")
        if not isinstance(self.origins, Iterable):
            raise InvalidConfiguration(
                f"cors is {shown(self.origins)}; allowed are '*', a list of origins, Cors(…) and None"
            )
        origins = [self.origins] if isinstance(self.origins, str) else list(self.origins)
        allowed = tuple(dict.fromkeys(normalize_origin(origin) for origin in origins if origin != "*"))
        object.__setattr__(self, "origins", "*" if "*" in origins else allowed)
