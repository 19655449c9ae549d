"""The client's side of one subscription, without I/O. Spec: docs/protocol.md, sections 4 and 5.

A driver sends a request with `headers`, reports what happens to it (`accept`, `refuse`, `receive`, `lose`), hands out
what is in `ready`, and sends the next request after `pause_s`, unless the subscription is `over`.

No value is lost or repeated across connections: `last_event_id` advances together with what enters `ready`, and each
request resumes after it.

Phases. WAITING: no connection; the next request is due in `pause_s`. REQUESTED: a request was sent. CONNECTED: the
response is an event stream. GREETED: its first comment arrived, so further comments are heartbeats. OVER: nothing more
will come. A connection ends in WAITING, whether it was lost, refused or closed by the reader; an end event, a 204 and
`close` lead to OVER, which is final.

Progress. Any event and any heartbeat is progress, and so is a connection that lasted `STEADY_S`: some proxies cut
silent connections. The server's greeting is not, or a proxy that cuts each connection at once would be retried forever.
Without progress the pauses double, and after `give_up_after` the subscription raises (see `backoff`).
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Generic, TypeVar

import msgspec

from asgi_realtime.client.backoff import Backoff, retry_after
from asgi_realtime.client.errors import ServerUnreachable, UnexpectedAnswer, error_from_response
from asgi_realtime.client.states import RunState, decode_state
from asgi_realtime.core.chunks import decode
from asgi_realtime.core.errors import ExpiredToken, RealtimeError, StreamGap, UsageError
from asgi_realtime.core.event_stream import Event, EventParser
from asgi_realtime.core.log import End
from asgi_realtime.core.run_errors import end_error
from asgi_realtime.loop.logger import client_logger
from asgi_realtime.streams.followers import StreamChunk

T = TypeVar("T")

STEADY_S = 5.0
"""A connection that lasts this long counts as progress, even if nothing arrived."""

_TEMPORARY = frozenset({408, 425, 429})
"""Statuses worth a retry, besides 5xx."""

_REMEMBERED_RUNS = 10_000
"""The number of runs whose last state is remembered to filter out repeated states."""

_MALFORMED = (UsageError, msgspec.MsgspecError, ValueError, TypeError, KeyError)


class Phase(Enum):
    """See the module docstring."""

    WAITING = auto()
    REQUESTED = auto()
    CONNECTED = auto()
    GREETED = auto()
    OVER = auto()


_NEXT = {
    Phase.WAITING: frozenset({Phase.REQUESTED, Phase.OVER}),
    Phase.REQUESTED: frozenset({Phase.CONNECTED, Phase.WAITING, Phase.OVER}),
    Phase.CONNECTED: frozenset({Phase.GREETED, Phase.WAITING, Phase.OVER}),
    Phase.GREETED: frozenset({Phase.WAITING, Phase.OVER}),
    Phase.OVER: frozenset[Phase](),
}
_STREAMING = frozenset({Phase.CONNECTED, Phase.GREETED})


@dataclass(frozen=True, slots=True)
class Raised:
    """An error in its place among the values."""

    error: RealtimeError


class SubscriptionProtocol(ABC, Generic[T]):
    """One subscription across all of its connections."""

    renewable = True
    """A refused token can be replaced."""

    def __init__(self, path: str, backoff: Backoff, last_event_id: str | None = None) -> None:
        self.path = path
        self.ready: deque[T | Raised] = deque()
        self.last_event_id = last_event_id
        self.refused_token: str | None = None
        """The token that the server last refused; the next request needs another one."""
        self._phase = Phase.WAITING
        self._backoff = backoff
        self._due_at = 0.0
        self._connected_at = 0.0
        self._renewed = False
        """The present token replaced a refused one, and has not brought any progress yet."""
        self._token: str | None = None
        self._parser = EventParser()

    @property
    def over(self) -> bool:
        """Nothing more will enter `ready`."""
        return self._phase is Phase.OVER

    @property
    def pause_s(self) -> float:
        """What remains of the pause before the next request. An interrupted pause does not restart."""
        return max(0.0, self._due_at - self._backoff.clock())

    def headers(self, token: str) -> dict[str, str]:
        """Begin a request and return its headers."""
        self._move(Phase.REQUESTED)
        self._token = token
        self._backoff.attempt()
        headers = {
            "accept": "text/event-stream",
            "accept-encoding": "identity",  # compression would hold chunks back
            "authorization": f"Bearer {token}",
            "cache-control": "no-store",
        }
        if self.last_event_id is not None:
            headers["last-event-id"] = self.last_event_id
        return headers

    def accept(self, status: int, headers: Mapping[str, str]) -> bool:
        """Whether the response is an event stream; if so, pass its body to `receive`, otherwise to `refuse`."""
        if status != 200 or not headers.get("content-type", "").lower().startswith("text/event-stream"):
            return False
        self._move(Phase.CONNECTED)
        self._parser = EventParser()
        self._connected_at = self._backoff.clock()
        return True

    def refuse(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """Handle a response that is not an event stream."""
        if status == 204:
            self.close()
        elif status in _TEMPORARY or status >= 500:
            at_least_s = retry_after(headers.get("retry-after"), headers.get("date"))
            self.lose(f"the server responded with {status}", at_least_s=at_least_s)
        elif status in (401, 403):
            self._refuse_token(error_from_response(status, headers, body))
        else:
            self._fail(error_from_response(status, headers, body))

    def receive(self, data: bytes) -> bool:
        """Handle bytes of the stream. False means that this connection has served its purpose and must be closed."""
        events = self._parser.feed(data)
        if self._parser.retry is not None:
            self._backoff.set_first_pause(self._parser.retry)
        if self._parser.comments:
            if self._phase is Phase.GREETED:
                self._progress()  # a heartbeat
            else:
                self._move(Phase.GREETED)
            self._parser.comments.clear()
        try:
            return all(map(self._handle, events))
        except _MALFORMED as exc:
            self._fail(UnexpectedAnswer(f"the server sent an event that cannot be read: {exc}", status=200))
            return False

    def lose(
        self,
        reason: str,
        *,
        cause: Exception | None = None,
        silent: bool = False,
        at_least_s: float = 0.0,
        gives_up: RealtimeError | None = None,
    ) -> None:
        """Handle a connection that broke or was never established: schedule the next request.

        After too long without progress, raise `gives_up` instead. `silent` means that the connection timed out; it is
        not steady, however long it lasted: that was the timeout itself.
        """
        if self.over:
            return
        if not silent:
            self._credit_steady()
        level = logging.WARNING if self._backoff.failures else logging.INFO
        pause_s = self._backoff.fail(at_least_s)
        if pause_s is None:
            self._fail(gives_up or ServerUnreachable(f"gave up on {self.path}: {reason}"), cause)
            return
        self._move(Phase.WAITING)
        self._due_at = self._backoff.clock() + pause_s
        client_logger.log(level, "%s: %s; next attempt in %.1f s", self.path, reason, pause_s)

    def leave(self) -> None:
        """The reader was interrupted and closed the connection; it may return at any time."""
        if self._phase is not Phase.WAITING:
            self._move(Phase.WAITING)
        self._backoff.suspend()

    def close(self) -> None:
        """End the subscription."""
        self._move(Phase.OVER)

    def _move(self, phase: Phase) -> None:
        if self.over:  # another task closed the subscription while its reader was between two steps
            return
        assert phase in _NEXT[self._phase], f"{self._phase} cannot become {phase}"
        self._phase = phase

    def _handle(self, event: Event) -> bool:
        """Handle one event; return whether others may follow it."""
        if event.event == "end":
            self._handle_end(decode(event.data.encode()))
            return False
        if event.event == "reconnect":
            self.lose("the server asked to reconnect", at_least_s=(event.retry or 0) / 1000)
            return False
        self._progress()
        self._take(event)
        if event.id:
            self.last_event_id = event.id
        return True

    def _handle_end(self, data: dict[str, Any]) -> None:
        reason, error = data["reason"], data.get("error")
        if reason != "token_expired":
            self._finish(End(reason, error))
            self.close()
            return
        self._credit_steady()
        expired = ExpiredToken("the access token has expired")
        if self._renewed:  # even the new one expired early; the next may last longer
            self.refused_token = self._token
            self.lose("the access token expired soon after the server accepted it", gives_up=expired)
        else:
            self._refuse_token(expired)

    def _refuse_token(self, error: RealtimeError) -> None:
        self.refused_token = self._token
        if self._renewed or not self.renewable:
            self._renewed = False
            self._fail(error)
        else:
            self._renewed = True
            self._move(Phase.WAITING)

    def _credit_steady(self) -> None:
        if self._phase in _STREAMING and self._backoff.clock() - self._connected_at >= STEADY_S:
            self._progress()

    def _progress(self) -> None:
        self._renewed = False
        self._backoff.reset()

    def _fail(self, error: RealtimeError, cause: Exception | None = None) -> None:
        """End the connection with an error. The reader can continue after it."""
        self._move(Phase.WAITING)
        self._raise(error, cause)

    def _raise(self, error: RealtimeError, cause: Exception | None = None) -> None:
        error.__cause__ = cause
        self.ready.append(Raised(error))

    @abstractmethod
    def _take(self, event: Event) -> None:
        """Handle an event other than `end` and `reconnect`. Ignore unknown ones."""

    @abstractmethod
    def _finish(self, end: End) -> None:
        """Handle the end of the stream."""


class RunsProtocol(SubscriptionProtocol[RunState]):
    """The states of the runs of a feed, each once."""

    def __init__(self, path: str, backoff: Backoff) -> None:
        super().__init__(path, backoff)
        self._last_hashes: dict[str, int] = {}

    def _take(self, event: Event) -> None:
        if event.event != "run":
            return
        state, content = decode_state(event.data.encode()), hash(event.data)
        if self._last_hashes.pop(state.id, None) != content:
            self.ready.append(state)
        self._last_hashes[state.id] = content
        if len(self._last_hashes) > _REMEMBERED_RUNS:
            del self._last_hashes[next(iter(self._last_hashes))]

    def _finish(self, end: End) -> None:
        """The last states already show how the runs ended."""


class ChunksProtocol(SubscriptionProtocol[T]):
    """The chunks of a stream, then an error unless the run completed. `convert` makes the values of `ready`."""

    def __init__(
        self, path: str, backoff: Backoff, stream: str, start_index: int, convert: Callable[[StreamChunk], T]
    ) -> None:
        super().__init__(path, backoff, str(start_index - 1) if start_index else None)
        self._stream = stream
        self._convert = convert

    def _take(self, event: Event) -> None:
        if event.event == "message":
            chunk = StreamChunk(self._stream, int(event.id or ""), decode(event.data.encode()))
            self.ready.append(self._convert(chunk))
        elif event.event == "gap":
            data = decode(event.data.encode())
            requested, first = data["requested"], data["first"]
            message = f"chunk {requested} of stream {self._stream!r} has expired; the oldest retained chunk is {first}"
            self._raise(StreamGap(message, requested=requested, first=first))

    def _finish(self, end: End) -> None:
        if end.reason != "complete":
            self._raise(end_error(end))
