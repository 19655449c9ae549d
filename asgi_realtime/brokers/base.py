"""What a broker keeps, and what it guarantees.

A broker keeps streams (append-only logs), runs (versioned records), topics (indexes of changed runs) and claims. Every
guarantee stands at its method and is tested by the suite in `asgi_realtime.testing.conformance`, which a backend has
to pass. A cancelled call happened entirely or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple, Protocol, runtime_checkable

from asgi_realtime.brokers.live_log import LiveLog
from asgi_realtime.core.log import End, Entry, Page, Position, Producer, StreamKey
from asgi_realtime.core.runs import RunRecord
from asgi_realtime.core.topics import Change, Changes, Cursor
from asgi_realtime.loop.waiting import WaitList

MARKS_KEPT = 64
"""How many of a run's newest commits a broker recognises when they are retried, at least."""


class ChangeMark(NamedTuple):
    """The name of one commit, the same in each retry: the writer, and a number that it uses once for each run.

    Numbers need not arrive in order: one writer may have several commits under way.
    """

    writer: str
    number: int


class LiveTopic(Protocol):
    """A topic that is followed: ask `changes`, then wait at `waiting`. One for each topic and process."""

    waiting: WaitList

    async def changes(self, cursor: Cursor | None, *, limit: int = 1000) -> Changes:
        """As `Broker.changes`. Raises `BrokerUnavailable` if the topic cannot be followed any more, `ServerShutdown` if
        the broker was left."""
        ...


class Broker(Protocol):
    """The storage and distribution behind a `Realtime`. An async context manager that may be entered again after exit.

    All methods raise `BrokerUnavailable` when the backend does not answer; nothing is known of such a call then. One
    that is under way when the broker is left may raise `ServerShutdown`.
    """

    shared: bool
    """Whether other processes see what this one writes."""

    warnings: Sequence[str]
    """What is wrong with how the backend is set up, in words for people; as known since the last `ping`."""

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

        Appends to one key are serialised and no reader sees part of a call. An end is durable, final and idempotent.
        With a producer a retried call is harmless: what was stored is skipped, also if the stream has ended since.
        An input (`key.hidden`) is never trimmed; what would take all inputs of the run over `Limits.inputs_bytes` is
        refused. Raises `RunNotFound`, `StreamClosed` (the stream or its run is over), `ProducerGap`, `LimitExceeded`.

        `at` is for a backend that can lose what it acknowledged: the producer writes it again, from the seq where it
        stood. Raises `StreamLost` if that place is taken, `RestoreOutOfOrder` if the stream has not come to it yet.
        """
        ...

    async def read(self, key: StreamKey, *, after: int = -1, limit: int = 500) -> Page:
        """The entries after a cursor (exclusive), at most `limit`: some if there are any. A stream that nobody wrote is
        empty.

        A page that starts behind `after + 1` tells of a gap: what lies between was trimmed. Raises `RunNotFound`.
        """
        ...

    async def produced(self, key: StreamKey, producer_id: str) -> int:
        """How many items of a producer the stream has counted: its next append may start there, or before.

        0 for one that never wrote here, also of a stream that nobody wrote. The count outlives the entries and the end
        of the stream. Raises `RunNotFound`.
        """
        ...

    def live(self, key: StreamKey) -> AbstractAsyncContextManager[LiveLog]:
        """Follow a stream: its newest part and every later append, joined without a gap or a duplicate.

        The log may begin later than what is retained: what lies before is to be `read`. If acknowledged entries were
        lost so that readers are ahead of the stream, the log fails, and they come back by their cursors. Entering
        raises `RunNotFound`. Leaving, also by cancellation, leaves nothing behind.
        """
        ...

    async def commit(
        self, record: RunRecord, *, expect: int, change: ChangeMark, floors: Mapping[tuple[str, str], int] | None = None
    ) -> int:
        """Store a record if the stored version is `expect` (0: the run must not exist yet); return its version.

        A record follows the stored version; one that is created may have any, since its owner may have to create it
        again. `floors` say, by stream and producer id, how many items of a producer a stream must have counted: if it
        has not, acknowledged entries were lost, and `StreamBehind` is raised before anything is changed. Nothing
        follows a terminal record.

        The record and its own topic `run:<id>` change in one step; a terminal record ends all streams of the run in
        that step. Before the call returns, the topics in `record.topics` are told: each change at least once, never an
        older version over a newer one; a mark of the same step makes the run due as `unpublished` until that is done.
        A commit whose mark is among the newest `MARKS_KEPT` of the run changes nothing and returns the version of then.
        Raises `VersionConflict` with the stored record, `LimitExceeded` for a new run that there is no room for.
        """
        ...

    async def load(self, run_ids: Sequence[str]) -> list[RunRecord | None]:
        """The newest records, in the order asked; None for a run that does not exist."""
        ...

    async def changes(self, topic: str, *, after: Cursor | None = None, limit: int = 1000) -> Changes:
        """What changed in a topic after a cursor, oldest first; a snapshot if the cursor is of no use (or None).

        Index and position are read in one step, and a record that is loaded afterwards is at least as new.
        """
        ...

    def follow(self, topic: str) -> AbstractAsyncContextManager[LiveTopic]:
        """Follow a topic. A change that was committed before entering is known then, whoever committed it; one that is
        committed after entering wakes those who wait, and so does a removal."""
        ...

    async def claim(self, key: str, value: str, *, ttl_s: float) -> str:
        """Store a value under a key unless there is one; return the one that is stored. The first wins.

        It stays until `ttl_s` is over, or until the run that it was claimed for is removed.
        """
        ...

    async def claimed(self, key: str) -> str | None:
        """The value that is stored under a key now; None if there is none, or none any more.

        It says what `claim` would have returned, and stores nothing: between the two another may claim.
        """
        ...

    async def due(self, kind: str, *, limit: int = 100, skip: int = 0) -> list[str]:
        """The runs that are due for `kind` (see `core.runs.DUE_KINDS`) by the broker's clock, oldest first.

        `skip` leaves out so many of the oldest: those that the caller has seen and cannot do anything for.

        A run stays due until a commit, `renew`, `enqueued`, `publish` or `remove` changes that.

        `enqueue` and `lease` are counted from the commit that makes a run QUEUED, or EXECUTING: it is due
        `Timeouts.lease` later, by the broker's clock whatever the record says, unless it leaves that status. Other
        commits in between change nothing about that.
        """
        ...

    async def renew(self, run_ids: Sequence[str], *, owner: str) -> None:
        """Put off what is due of runs that this process has in hand, to `Timeouts.lease` from now.

        That is `lease` for those that are EXECUTING and owned by `owner`, and `enqueue` for those that are QUEUED,
        whoever calls: who holds them in memory sees to them. What is not due at any time, since `enqueued`, does not
        become so. Other runs are left alone.
        """
        ...

    async def enqueued(self, run_id: str) -> None:
        """A queue that outlives this process has the run: it is not due as `enqueue` any more.

        Changes nothing for a run that is not QUEUED, also not for what follows if it becomes so later.
        """
        ...

    async def publish(self, run_id: str) -> None:
        """Tell the topics of a run again. Harmless at any time."""
        ...

    async def remove(self, run_id: str) -> None:
        """Remove a run that is over: its record, its streams, its places in all topics, and in the same step
        `record.claim` if that still stands for this run: an id is never used for another run.

        Those who follow its streams still get what is there and the end. Those who follow its topics are woken: that
        it is gone stands in no change, but loading it tells.
        """
        ...

    async def ping(self) -> None:
        """Return if the backend answers, raise `BrokerUnavailable` if not."""
        ...


@runtime_checkable
class ImmediateBroker(Protocol):
    """A broker that appends at once, in memory: a pipe then needs no task of its own for writing."""

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


@runtime_checkable
class InOneProcess(Protocol):
    """A broker that keeps everything in the process that it is used in."""

    @property
    def home(self) -> str:
        """Names that process and this broker in it. Tokens carry it, so that another process can tell why it does not
        find their runs."""
        ...


@runtime_checkable
class ThreadRenewal(Protocol):
    """A broker whose leases can be renewed while the loop is blocked, so that this crashes no runs."""

    def renew_from_thread(self, run_ids: Sequence[str], *, owner: str) -> None:
        """As `Broker.renew`, blocking, from a thread that is not the loop's. Raises `BrokerUnavailable`."""
        ...


__all__ = [
    "MARKS_KEPT",
    "Broker",
    "Change",
    "ChangeMark",
    "Changes",
    "Cursor",
    "InOneProcess",
    "End",
    "Entry",
    "ImmediateBroker",
    "LiveTopic",
    "Page",
    "Position",
    "Producer",
    "StreamKey",
    "ThreadRenewal",
]
