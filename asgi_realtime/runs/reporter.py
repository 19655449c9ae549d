"""What happens in a process, for the people who operate it: the log, and the metrics if they are on.

A `Reporter` writes the log. `metrics.Metrics` is a `Reporter` that also counts. No method is called for each chunk: the
writers and the subscriptions count chunks for themselves, and hand over what can be counted when they begin and end. No
message contains a token, a payload or a chunk, and a flood of events does not flood the log.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

from asgi_realtime.core.errors import (
    AuthorizeFailed,
    BrokerUnavailable,
    ExpiredToken,
    LimitExceeded,
    RealtimeError,
    RequestCutOff,
    RunNotFound,
    ServerShutdown,
    TaskError,
    ThreadBusy,
)
from asgi_realtime.core.log import StreamKey
from asgi_realtime.core.runs import Status, StoredRecord
from asgi_realtime.loop.logger import logger
from asgi_realtime.loop.throttle import Throttle

_EXPECTED = (RunNotFound, RequestCutOff, ServerShutdown, BrokerUnavailable, AuthorizeFailed, ExpiredToken)
"""Rejections for which a client came early, left or has to come again; the log has their causes. They are logged at
DEBUG."""


S = TypeVar("S", bound=Callable[[Any], Awaitable[None]])


class Written(Protocol):
    """A stream writer: how many chunks and bytes the broker has acknowledged."""

    chunks: int
    bytes: int


class Reporter:
    """Writes the log."""

    def __init__(self) -> None:
        self._throttle = Throttle()

    # Runs

    def run_changed(self, before: StoredRecord | None, after: StoredRecord) -> None:
        """This process has stored a version of a run. `before` is None for a new run."""
        if before is not None and before.status is after.status:
            return
        if after.is_executing:
            logger.debug("run %s of task %r started", after.id, after.task)
        elif after.is_completed:
            level = logging.DEBUG if after.status in (Status.COMPLETED, Status.CANCELED) else logging.INFO
            if logger.isEnabledFor(level):
                reason = "" if after.error is None else f" ({after.error.name})"
                text = "run %s of task %r ended %s%s after %.3f s"
                logger.log(level, text, after.id, after.task, after.status, reason, after.duration_ms / 1000)

    def run_raised(self, run_id: str, task: str, error: BaseException) -> None:
        """The code of a run has raised. A `TaskError` is meant for users, and the end of the run names it."""
        if isinstance(error, TaskError) and error.__cause__ is None:
            return
        more = self._throttle.admit(f"failed {task} {type(error).__name__}")
        if more is not None:
            logger.error("run %s of task %r failed%s", run_id, task, more, exc_info=error)

    def on_end_failed(self, run_id: str, task: str, error: BaseException) -> None:
        """The `on_end` of a run has raised."""
        more = self._throttle.admit(f"on_end {task} {type(error).__name__}")
        if more is not None:
            text = "the on_end of run %s (task %r) failed; it is not called again%s"
            logger.error(text, run_id, task, more, exc_info=error)

    def on_end_cut(self, run_id: str, task: str) -> None:
        """A shutdown did not wait any longer for the `on_end` of a run."""
        more = self._throttle.admit(f"on_end {task}")
        if more is not None:
            logger.warning("the on_end of run %s (task %r) was cut by the shutdown%s", run_id, task, more)

    # Chunks

    def writer_opened(self, writer: Written) -> None:
        """A stream writer was created."""

    def writer_closed(self, chunks: int, bytes: int) -> None:
        """Nobody uses a writer anymore, and this is what it has written in all. Can be called from any thread."""

    def appended(self, key: StreamKey, first: int, seconds: float) -> None:
        """A broker outside this process has acknowledged an append. `first` is the seq of its first chunk."""
        if first == 0:
            self.stream_began(key)

    def stream_began(self, key: StreamKey) -> None:
        """The first chunk of a stream was stored."""

    def broker_failed(self) -> None:
        """A call of the broker failed because it is unavailable."""

    # Readers

    def counting(self, kind: str, send: S) -> S:
        """The `send` of a subscription of this kind; it may count the bytes of its body."""
        return send

    def subscription_ended(self, chunks: int) -> None:
        """A subscription has ended, and has sent so many chunks in all."""

    def reader_stalled(self, kind: str, run_id: str, seconds: float) -> None:
        """The connection of a reader is dropped because it did not accept data for so long."""
        more = self._throttle.admit("stalled")
        if more is not None:
            text = "a reader was cut, because it accepted no data for %.0f s (%s%s)%s"
            logger.warning(text, seconds, kind, f" of run {run_id}" if run_id else "", more)

    # Requests

    def authorize_failed(self, name: str, request: str, error: Exception) -> None:
        """The host's function of this name, which authorizes requests, has raised or took too long."""
        more = self._throttle.admit(f"{name} {type(error).__name__}")
        if more is not None:
            logger.error("%s= failed for %s; the client will try again%s", name, request, more, exc_info=error)

    def rejected(self, error: RealtimeError, request: str) -> None:
        """A request was answered with an error. `request` is what to show of it."""
        level = logging.DEBUG if isinstance(error, _EXPECTED) else logging.WARNING
        more = self._throttle.admit(f"rejected {error.code}") if logger.isEnabledFor(level) else None
        if more is not None:
            is_safe = isinstance(error, LimitExceeded | ThreadBusy)  # other messages can quote much of the request
            why = f": {error}" if is_safe else ""
            logger.log(level, "rejected %s with %d %s%s%s", request, error.status, error.code, why, more)
