"""What a reader makes of answers and events: values, errors, an end, or another try from where it was.

Without I/O. A driver asks for `headers`, tells of what came (`takes`, `answered`, `received`, `lost`), hands out what
is in `ready`, and connects again after `pause_s` as long as it is not `over`. Nothing is lost or told twice over any
number of connections: the position moves with what was put into `ready`. Spec: docs/protocol.md, sections 4 and 5.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec

from asgi_realtime.client.attempts import Attempts, retry_after
from asgi_realtime.client.errors import ServerUnreachable, UnexpectedAnswer, no_stream, redirected, refusal
from asgi_realtime.client.states import RunState, decode_state
from asgi_realtime.core.chunks import decode
from asgi_realtime.core.errors import ExpiredToken, RealtimeError, StreamGap, UsageError
from asgi_realtime.core.event_stream import Event, EventParser
from asgi_realtime.core.log import End
from asgi_realtime.core.run_errors import end_error
from asgi_realtime.streams.followers import StreamChunk

logger = logging.getLogger("asgi_realtime.client")

T = TypeVar("T")

_NOT_FINAL = frozenset({408, 425, 429})
"""Besides 5xx: who asks again may get another answer."""

_KNOWN_RUNS = 10_000
"""Of so many runs the last state is remembered, so that it is not told twice."""

_MALFORMED = (UsageError, msgspec.MsgspecError, ValueError, TypeError, KeyError)


@dataclass(frozen=True, slots=True)
class Raised:
    """An error that stands among the values."""

    error: RealtimeError


class Following(ABC, Generic[T]):
    """One subscription, over all of its connections. `renewable`: a token that is refused may be replaced."""

    def __init__(self, path: str, attempts: Attempts, *, renewable: bool, last_event_id: str | None = None) -> None:
        self.path = path
        self.ready: deque[T | Raised] = deque()
        self.over = False
        self.last_event_id = last_event_id
        self.refused_token: str | None = None
        """The token that the server did not take, until one is taken."""
        self._attempts = attempts
        self._renewable = renewable
        self._renewed = False
        self._due = 0.0
        self._token: str | None = None
        self._parser = EventParser()
        self._greeted = False
        self._streaming = False

    @property
    def pause_s(self) -> float:
        """What is left of the pause before the next request: who was disturbed in it does not begin it anew."""
        return max(0.0, self._due - self._attempts.clock())

    def headers(self, token: str) -> dict[str, str]:
        """Those of the next request."""
        self._token = token
        self._streaming = False
        self._attempts.trying()
        resume = {} if self.last_event_id is None else {"last-event-id": self.last_event_id}
        return {
            "accept": "text/event-stream",
            "accept-encoding": "identity",  # what compresses holds chunks back
            "authorization": f"Bearer {token}",
            "cache-control": "no-store",
            **resume,
        }

    def takes(self, status: int, headers: Mapping[str, str]) -> bool:
        """Whether the answer is a stream, to be given to `received`. If not it goes to `answered` with its body."""
        if status != 200 or not headers.get("content-type", "").lower().startswith("text/event-stream"):
            return False
        self._parser = EventParser()
        self._greeted = False
        self._streaming = True
        self._attempts.note_open()
        return True

    def answered(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """An answer that is no stream."""
        if status == 204:
            self.over = True
        elif status in _NOT_FINAL or status >= 500:
            at_least_s = retry_after(headers.get("retry-after"), headers.get("date"))
            self._come_back(f"the server answered {status}", at_least_s=at_least_s)
        elif status in (401, 403):
            self._token_refused(refusal(status, body))
        elif 300 <= status < 400:
            self._raise(redirected(status, headers.get("location", "")))
        elif status < 300:
            self._raise(no_stream(status, headers.get("content-type", "")))
        else:
            self._raise(refusal(status, body))

    def received(self, data: bytes) -> bool:
        """Bytes of a stream. False: that was all of this connection, which is to be closed."""
        events = self._parser.feed(data)
        if self._parser.retry is not None:
            self._attempts.server_wants(self._parser.retry)
        if self._parser.comments:
            if self._greeted:
                self._progressed()  # a heartbeat
            self._greeted = True
            self._parser.comments.clear()
        try:
            return all(map(self._took, events))
        except _MALFORMED as exc:
            self._raise(UnexpectedAnswer(f"the server sent an event that cannot be read: {exc}", status=200))
            return False

    def lost(self, reason: str, *, cause: Exception | None = None, silent: bool = False) -> None:
        """The connection is gone, or did not come about. `silent`: it was given up, since nothing was heard."""
        if self._streaming and not silent and self._attempts.lasted():
            self._progressed()
        self._come_back(reason, cause=cause)

    def left(self) -> None:
        """The driver was disturbed, and the connection closed."""
        self._attempts.left()

    def _come_back(
        self,
        reason: str,
        *,
        at_least_s: float = 0.0,
        cause: Exception | None = None,
        gives_up: RealtimeError | None = None,
    ) -> None:
        """Try again after a pause, or raise `gives_up` if that went on for too long."""
        if self.over:  # closed while it was read
            return
        level = logging.WARNING if self._attempts.failures else logging.INFO
        pause = self._attempts.failed(at_least_s)
        if pause is None:
            self._due = 0.0
            self._raise(gives_up or ServerUnreachable(f"gave up on {self.path}: {reason}"), cause)
            return
        self._due = self._attempts.clock() + pause
        logger.log(level, "%s: %s; next try in %.1f s", self.path, reason, pause)

    def close(self) -> None:
        """Nothing comes after this."""
        self.over = True

    def _took(self, event: Event) -> bool:
        """Whether more may follow after this event."""
        if event.event == "end":
            self._ended(decode(event.data.encode()))
            return False
        if event.event == "reconnect":
            if self._attempts.lasted():
                self._progressed()
            self._come_back("the server asks to come back", at_least_s=(event.retry or 0) / 1000)
            return False
        self._progressed()
        self._take(event)
        if event.id:
            self.last_event_id = event.id
        return True

    def _ended(self, data: dict[str, Any]) -> None:
        reason, error = data["reason"], data.get("error")
        if reason != "token_expired":
            self.over = True
            self._finish(End(reason, error))
            return
        if self._attempts.lasted():
            self._progressed()
        expired = ExpiredToken("the access token has expired")
        if self._renewed:  # that was a new one, and was taken: the next may have more time left
            self.refused_token = self._token
            self._come_back("the access token expired soon after it was taken", gives_up=expired)
        else:
            self._token_refused(expired)

    def _token_refused(self, error: RealtimeError) -> None:
        self.refused_token = self._token
        if self._renewed or not self._renewable:
            self._renewed = False
            self._raise(error)
        else:
            self._renewed = True
            self._due = 0.0

    def _progressed(self) -> None:
        self._renewed = False
        self._attempts.progressed()

    def _raise(self, error: RealtimeError, cause: Exception | None = None) -> None:
        error.__cause__ = cause
        self.ready.append(Raised(error))

    @abstractmethod
    def _take(self, event: Event) -> None:
        """An event that is neither `end` nor `reconnect`. What is not known is passed over."""

    @abstractmethod
    def _finish(self, end: End) -> None:
        """Nothing more will come."""


class RunsFollowing(Following[RunState]):
    """The states of the runs of a feed, each once."""

    def __init__(self, path: str, attempts: Attempts, *, renewable: bool) -> None:
        super().__init__(path, attempts, renewable=renewable)
        self._told: dict[str, int] = {}

    def _take(self, event: Event) -> None:
        if event.event != "run":
            return
        state, content = decode_state(event.data), hash(event.data)
        if self._told.pop(state.id, None) != content:
            self.ready.append(state)
        self._told[state.id] = content
        if len(self._told) > _KNOWN_RUNS:
            del self._told[next(iter(self._told))]

    def _finish(self, end: End) -> None:
        """The last states tell how the runs ended."""


class ChunksFollowing(Following[StreamChunk]):
    """The chunks of a stream. Raises how the run ended if it did not complete."""

    def __init__(self, path: str, attempts: Attempts, *, renewable: bool, stream: str, start_index: int) -> None:
        position = str(start_index - 1) if start_index else None
        super().__init__(path, attempts, renewable=renewable, last_event_id=position)
        self._stream = stream

    def _take(self, event: Event) -> None:
        if event.event == "message":
            self.ready.append(StreamChunk(self._stream, int(event.id or ""), decode(event.data.encode())))
        elif event.event == "gap":
            data = decode(event.data.encode())
            requested, first = data["requested"], data["first"]
            message = f"chunk {requested} of stream {self._stream!r} is past its retention, the oldest kept is {first}"
            self._raise(StreamGap(message, requested=requested, first=first))

    def _finish(self, end: End) -> None:
        if end.reason != "complete":
            self._raise(end_error(end))
