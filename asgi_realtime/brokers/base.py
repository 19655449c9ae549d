"""The interface of a broker: what it stores, and what each method guarantees.

A broker stores streams (append-only logs), runs (versioned records), topics (indexes of changed runs) and claims. Each
guarantee is stated at its method and tested by the suite in `asgi_realtime.testing.conformance`, which every backend
has to pass. A call that is cancelled took full effect or none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple, Protocol, runtime_checkable

from asgi_realtime.brokers.live_log import LiveLog
from asgi_realtime.core.log import End, Entry, Page, Position, Producer, StreamKey
from asgi_realtime.core.runs import StoredRecord
from asgi_realtime.core.topics import Change, Changes, Cursor
from asgi_realtime.loop.waiting import WaitList

MARKS_KEPT = 64
"""How many of a run's newest commits a broker recognises when they are retried, at least."""

INPUT_COST = 256
"""What an input message counts in `Limits.inputs_bytes` in addition to its JSON: about what storing it costs."""


class ChangeMark(NamedTuple):
    """Identifies one commit, and is the same in each retry: the writer, and a number it uses once for each run.

    Numbers need not arrive in order, because a writer can have several commits under way.
    """

    writer: str
    number: int


class LiveTopic(Protocol):
    """A topic that is followed, one for each topic and process. Use it through `brokers.following.Follower`."""

    waiting: WaitList

    @property
    def failure(self) -> Exception | None:
        """Why the topic can no longer be followed. It is final: to continue, follow the topic anew."""
        ...

    async def changes(self, cursor: Cursor | None, *, limit: int = 1000) -> Changes:
        """As `Broker.changes`. Raises `failure` once that is set: `BrokerUnavailable`, or `ServerShutdown` if the
        broker was closed. `BrokerUnavailable` without a `failure` is temporary; the broker then wakes `waiting`."""
        ...


class Broker(Protocol):
    """The storage and distribution behind a `Realtime`. An async context manager that can be entered again after exit.

    All methods raise `BrokerUnavailable` when the backend does not answer; such a call may or may not have taken
    effect. A call that is under way when the broker is closed may raise `ServerShutdown`.
    """

    shared: bool
    """Whether other processes see what this one writes."""

    warnings: Sequence[str]
    """Problems with the setup of the backend, for people to read; as of the last `ping`."""

    async def __aenter__(self) -> Broker: ...

    async def __aexit__(self, *exc_info: object) -> None: ...

    async def append(
        self,
        key: StreamKey,
        items: Sequence[bytes],
        *,
        producer: Producer | None = None,
        end: End | None = None,
        at: int | None = None,
    ) -> Position:
        """Append JSON items with consecutive seqs, and end the stream in the same step if `end` is given.

        Appends to one stream are serialized, and no reader sees part of a call. An end is durable, final and
        idempotent. With a producer, retries are harmless: items that were stored before are skipped, even if the stream
        has ended since. An input (`key.hidden`) is never trimmed; an append that would take the items of all inputs of
        the run over `Limits.inputs_bytes` (their JSON and `INPUT_COST` for each) is rejected. Raises `RunNotFound`,
        `StreamClosed` (the stream or its run has ended), `ProducerGap`, `LimitExceeded`.

        `at` is for backends that can lose acknowledged data: the producer restores its items from this seq on. Raises
        `StreamLost` if other items have taken the place, `RestoreOutOfOrder` if earlier items have yet to be restored.
        """
        ...

    async def read(self, key: StreamKey, *, after: int = -1, limit: int = 500) -> Page:
        """The entries after a cursor (exclusive): at most `limit`, and at least one if there are any.

        A stream that was never written is empty. A page that starts after `after + 1` shows a gap: the entries in
        between were trimmed. Raises `RunNotFound`.
        """
        ...

    async def produced(self, key: StreamKey, producer_id: str) -> int:
        """How many items of a producer the stream has counted: its next append starts there, or before.

        0 for a producer or stream that never wrote. The count outlives the entries and the end of the stream. Raises
        `RunNotFound`.
        """
        ...

    def live(self, key: StreamKey) -> AbstractAsyncContextManager[LiveLog]:
        """Follow a stream: its newest part and every later append, joined without a gap or a duplicate.

        The log can start later than the retained part; `read` has what is before. If acknowledged entries were lost, so
        that readers are ahead of the stream, the log fails, and readers resume by their cursors. Entering raises
        `RunNotFound`. Leaving, also by cancellation, releases everything.
        """
        ...

    async def commit(
        self,
        record: StoredRecord,
        *,
        expect: int,
        change: ChangeMark,
        floors: Mapping[tuple[str, str], int] | None = None,
    ) -> int:
        """Store a record if the stored version is `expect` (0: the run must not exist); return its version.

        Versions are consecutive, except that a new record may have any: its owner may have to create it again after
        data loss. `floors` maps a stream and a producer id to the number of items that the stream must have counted. If
        it has counted fewer, acknowledged entries were lost, and `StreamBehind` is raised before anything is changed.
        Nothing follows a terminal record.

        The record and its own topic `run:<id>` change in one step; a terminal record ends all streams of the run in
        that step. Before the call returns, the change is published to the topics in `record.topics`: at least once, and
        never an older version over a newer one. A mark set in the same step makes the run due as `unpublished` until
        that is done. A commit whose mark is among the newest `MARKS_KEPT` of the run changes nothing and returns the
        version that it stored then. Raises `VersionConflict` with the stored record, `LimitExceeded` for a new run
        without room.
        """
        ...

    async def load(self, run_ids: Sequence[str]) -> list[StoredRecord | None]:
        """The newest records in the order of the ids; None for a run that does not exist."""
        ...

    async def changes(self, topic: str, *, after: Cursor | None = None, limit: int = 1000) -> Changes:
        """The changes of a topic after a cursor, oldest first; a snapshot without a cursor, or with an unusable one.

        Index and position are read in one step, and a record that is loaded afterwards is at least as new.
        """
        ...

    def follow(self, topic: str) -> AbstractAsyncContextManager[LiveTopic]:
        """Follow a topic. Every change that any process committed before entering is known; changes that are committed
        after entering wake the waiters, and so do removals."""
        ...

    async def claim(
        self, key: str, value: str, *, ttl_s: float, owner: str | None = None, instead_of: str | None = None
    ) -> str:
        """Store a value under a key unless it has one; return the stored value. The first wins.

        The value `instead_of` is replaced, together with its lifetime, in one step: of several callers that replace the
        same value with different ones, one succeeds, and the others get its value.

        The claim lasts for `ttl_s`, or until the run that it was made for is removed. It is charged to `owner`, the
        owner of a public token, or the host. Raises `LimitExceeded` without room.
        """
        ...

    async def claimed(self, key: str) -> str | None:
        """The value under a key now, or None. Stores nothing, so another process can claim the key right after."""
        ...

    async def due(self, kind: str, *, limit: int = 100, skip: int = 0) -> list[str]:
        """The runs that are due for `kind` (see `core.runs.DUE_KINDS`) by the broker's clock, oldest first.

        `skip` leaves out that many of the oldest: runs that the caller has seen and can do nothing for.

        A run stays due until a commit, `renew`, `enqueued`, `publish` or `remove` changes that.

        `enqueue`, `lease` and `on_end` count from the commit that makes a run QUEUED, EXECUTING, or terminal with
        `has_on_end`: it is due `Timeouts.lease` later, by the broker's clock whatever the record says, unless it leaves
        that status. Other commits in between do not change that.
        """
        ...

    async def renew(self, run_ids: Sequence[str], *, owner: str) -> None:
        """Put off what this process is responsible for, to `Timeouts.lease` from now.

        That is `lease` for runs that are EXECUTING and owned by `owner`, `enqueue` for QUEUED runs of any caller: a
        process that holds them in memory is going to start them, and `on_end` in the same way. A run that is not due at
        any time, because of `enqueued` or `on_end_called`, does not become due. Other runs are left alone.
        """
        ...

    async def enqueued(self, run_id: str) -> None:
        """A queue that outlives this process has accepted the run, so it is no longer due as `enqueue`.

        Does nothing for a run that is not QUEUED, and does not affect it if it is QUEUED later.
        """
        ...

    async def take_on_end(self, run_id: str) -> bool:
        """Put off a run that is due as `on_end`, to `Timeouts.lease` from now: the caller is going to call it.

        Returns False, and changes nothing, if the run is not due now: another process has taken it, or called it. Of
        concurrent callers one gets True.
        """
        ...

    async def on_end_called(self, run_id: str) -> None:
        """The `on_end` of a run that is over has been called, so it is no longer due, and the run can be removed.
        Idempotent."""
        ...

    async def watch(self, run_id: str, *, process: str, readers: int, grace_s: float | None) -> None:
        """Count the readers that a process has of a run, in place of its last count, for `Timeouts.lease` from now.

        The run is due as `unwatched` once no process has counted a reader for `grace_s`, or never if that is None. Does
        nothing for a run that is over or does not exist. A run that is over is not due.
        """
        ...

    async def watchers(self, run_id: str) -> int:
        """How many readers all processes have counted. 0 for a run that is over or does not exist."""
        ...

    async def publish(self, run_id: str) -> None:
        """Publish the newest version of a run to its topics again. Harmless at any time."""
        ...

    async def remove(self, run_id: str) -> None:
        """Remove a run that has ended: its record, its streams, its entries in all topics, and in the same step
        those of `record.claims` whose value is still this run, because ids are never reused. Does nothing as long as an
        `on_end` has to be called: the run stays until `on_end_called`.

        Subscribers of its streams still get the remaining entries and the end. Followers of its topics are woken; no
        change records the removal, but loading the run shows it.
        """
        ...

    async def ping(self) -> None:
        """Return if the backend answers. Raises `BrokerUnavailable`."""
        ...


@runtime_checkable
class ImmediateBroker(Protocol):
    """A broker that appends in memory. A pipe then needs no task for writing."""

    def append_nowait(
        self,
        key: StreamKey,
        items: Sequence[bytes],
        *,
        producer: Producer | None = None,
        end: End | None = None,
        at: int | None = None,
    ) -> Position:
        """As `Broker.append`, without suspending."""
        ...


class ChunkAppender(Protocol):
    """Appends to one stream of an `AppenderBroker`."""

    def append(self, item: bytes) -> int | None:
        """Append one JSON item and return its seq; or do nothing and return None: `append_nowait` has to decide."""
        ...


@runtime_checkable
class AppenderBroker(ImmediateBroker, Protocol):
    """A broker with a short path for chunks that need no decision. Its results are those of `append_nowait`."""

    def appender(self, key: StreamKey) -> ChunkAppender:
        """The short path into a stream that has chunks. Not for inputs."""
        ...


@runtime_checkable
class InOneProcess(Protocol):
    """A broker that stores everything in its own process."""

    @property
    def home(self) -> str:
        """Identifies this process and broker. Tokens carry it, so that another process can explain why it does not find
        their runs."""
        ...


@runtime_checkable
class RunLists(Protocol):
    """A broker that stores short lists of runs, which all processes write to. Without it, the inspector lists the runs
    of its own process."""

    async def note_runs(self, name: str, runs: Sequence[tuple[str, int, int, bytes]], *, size: int) -> None:
        """Put runs into a list: the id, the time of the last change in unix milliseconds, the version, and a summary.

        A summary replaces that of an older version of the run. The list retains the `size` runs that changed last. Lost
        notes are tolerable, so a broker need not store them durably.
        """
        ...

    async def noted_runs(self, name: str) -> list[bytes]:
        """The summaries in a list, in any order."""
        ...


@runtime_checkable
class ThreadRenewal(Protocol):
    """A broker whose leases can be renewed while the loop is blocked, so that a blocked loop crashes no runs."""

    def renew_from_thread(self, run_ids: Sequence[str], *, owner: str) -> None:
        """As `Broker.renew`, blocking, for threads without an event loop. Raises `BrokerUnavailable`."""
        ...


__all__ = [
    "MARKS_KEPT",
    "AppenderBroker",
    "Broker",
    "Change",
    "ChangeMark",
    "Changes",
    "ChunkAppender",
    "Cursor",
    "InOneProcess",
    "End",
    "Entry",
    "ImmediateBroker",
    "LiveTopic",
    "Page",
    "Position",
    "Producer",
    "RunLists",
    "StreamKey",
    "ThreadRenewal",
]
