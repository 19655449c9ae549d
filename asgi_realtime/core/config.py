"""Settings as small values with named defaults, and the one place that reads spans of time.

Sizes are bytes, times are seconds. A value that makes no sense is refused here, not where it is used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import timedelta

from asgi_realtime.core.errors import InvalidConfiguration, UsageError, shown

Span = float | int | str | timedelta
"""A span of time: seconds, a `timedelta`, or text such as `"90s"`, `"15m"`, `"1h30m"`, `"2d"`."""

MAX_SPAN_S = 10 * 366 * 86400
"""Ten years: no span is longer."""

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
        seconds = float(max(-1, min(value, MAX_SPAN_S)))  # an int may be too large for a float
    else:
        raise UsageError(f"{name} is a {type(value).__name__}; allowed are seconds, a timedelta, or text like '15m'")
    if not 0 < seconds < MAX_SPAN_S:
        told = shown(value) if isinstance(value, str) else repr(value)
        raise UsageError(f"{name} is {told}; it must be more than zero and less than ten years")
    return seconds


class _Positive:
    """Refuses a value that is not above zero, whatever its name."""

    __slots__ = ()

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise InvalidConfiguration(
                    f"{type(self).__name__}.{field.name} is {value!r}; it must be a number above 0"
                )


@dataclass(frozen=True, slots=True)
class Limits(_Positive):
    """What is refused loudly once it is exceeded."""

    chunk_bytes: int = 1024 * 1024
    """One chunk, encoded."""
    payload_bytes: int = 3 * 1024 * 1024
    """One payload, encoded."""
    output_bytes: int = 10 * 1024 * 1024
    metadata_bytes: int = 256 * 1024
    """All metadata of one run, encoded."""
    append_bytes: int = 512 * 1024
    """The text of one append over HTTP."""
    input_bytes: int = 1024 * 1024
    tags: int = 10
    tag_length: int = 128
    key_length: int = 128
    """Stream keys, input ids, task ids, in characters."""
    idempotency_key_length: int = 512
    batch_runs: int = 1000
    batch_bytes: int = 32 * 1024 * 1024
    """All items of a batch, as they come over HTTP."""
    streams_per_run: int = 100
    inputs_per_run: int = 100
    """Ids under which data was sent into one run."""
    inputs_bytes: int = 8 * 1024 * 1024
    """All that was sent into one run. None of it is trimmed: what would be too much is refused."""
    feed_runs: int = 1000
    """Runs in the snapshot of one feed; the newest are kept."""
    topic_runs: int = 10_000
    """Runs that one tag or batch remembers; the newest are kept."""
    pipe_buffer: int = 10_000
    """Chunks in the local copy of a `Pipe`."""
    pending_bytes: int = 1024 * 1024
    """Bytes of one `Pipe` that wait for the broker's acknowledgement before its source waits."""
    source_threads: int = 64
    """Threads that read sync iterables, in the whole process."""
    task_threads: int = 64
    """Threads that run `def` tasks, in the whole process."""
    task_concurrency: int = 1000
    """Runs of one task at once, in this process, unless the task says otherwise."""
    subscribers: int = 20_000
    """Open subscriptions in this process."""
    subscribers_per_run: int = 10_000
    subscribers_per_token: int = 10_000
    token_life: float = 30 * 24 * 3600.0
    """Seconds that a token may last which is asked for over HTTP."""
    mirror_bytes: int = 1024 * 1024
    """Of each stream that is followed, in this process, when the broker is elsewhere; older chunks are read from it."""


@dataclass(frozen=True, slots=True)
class Retention(_Positive):
    """What is kept, and for how long."""

    stream_bytes: int = 8 * 1024 * 1024
    """Of one stream; its oldest chunks go first, and readers behind them are told."""
    total_bytes: int = 512 * 1024 * 1024
    """Of the memory broker: runs that ended longest ago go first, then the oldest chunks of the largest streams. If
    what cannot go fills it (payloads, metadata, inputs of runs that go on), new runs and chunks are refused."""
    after_end: float = 24 * 3600.0
    """A run and its streams, after the run ended."""
    idempotency_key: float = 24 * 3600.0
    """How long an idempotency key stands for its run, unless it says so itself; it goes with the run in any case."""
    request_key: float = 600.0
    """How long a request that is sent again, because its answer was lost, gets the run that it made."""
    batch: float = 3600.0
    """How long a batch that was created over HTTP waits for its items. One with an idempotency key waits as long as
    that stands for it."""


@dataclass(frozen=True, slots=True)
class Timeouts(_Positive):
    """How long things may take."""

    def __post_init__(self) -> None:
        _Positive.__post_init__(self)
        if self.stream_age < self.heartbeat:
            raise InvalidConfiguration(
                f"Timeouts.stream_age is {self.stream_age!r}; it must not be less than heartbeat, {self.heartbeat!r}:"
                " a quiet stream would end before its client has heard anything"
            )

    heartbeat: float = 15.0
    """Silence on a subscription before a comment is sent."""
    poll: float = 20.0
    """How long a poll of the official clients is held when there is nothing to tell, within 15 %."""
    receive: float = 30.0
    """Silence of a client while its request's body is on its way."""
    send: float = 30.0
    """One send to a subscriber that does not read; then it is dropped and may resume."""
    append: float = 30.0
    """How long a writer keeps trying while the broker is away."""
    writer: float = 16 * 60.0
    """Silence of a writer over HTTP before its request is ended; the official client begins anew after 15 minutes."""
    broker: float = 5.0
    """One answer of a broker that is elsewhere, and a connection to it; then it counts as away."""
    drain: float = 0.5
    """How long tasks may go on at shutdown: short, so that the server exits within a second. Raise it to let answers
    end."""
    cancel: float = 5.0
    """How long the owner of a run may take to cancel it; then any process does."""
    close: float = 5.0
    """How long closing a source may take."""
    find: float = 5.0
    """How long a subscription waits for a run that its token names and that is not there yet."""
    lease: float = 30.0
    """How long the owner of a run may be silent before the run is CRASHED."""
    tick: float = 0.5
    """The period of the ticker: the precision of heartbeats, expiry, delays and time-outs."""
    stream_age: float = math.inf
    """How old an open subscription may become, less up to 15 % so that those opened together do not end together. Then
    it ends as at a shutdown and its client resumes: so a deploy is nothing new, and connections do not stay for ever on
    the servers that were there first."""


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
    "x-should-retry",
)
"""The response headers that a page of another origin has to see. For a host whose own CORS middleware sets the list."""


@dataclass(frozen=True, slots=True)
class Cors:
    """Which pages of other origins may read: `"*"`, or a list of origins such as `["https://app.example"]`.

    No credentials are used (tokens travel in a header or in the query), so `"*"` is safe and the default.
    """

    origins: Sequence[str] | str = "*"
    max_age: int = 300

    def __post_init__(self) -> None:
        origins = [self.origins] if isinstance(self.origins, str) else list(self.origins)
        for origin in origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s,]+", origin):
                raise InvalidConfiguration(
                    f"cors origin {origin!r}; allowed are '*' and origins like 'https://app.example'"
                )
        object.__setattr__(self, "origins", "*" if "*" in origins else tuple(origins))
