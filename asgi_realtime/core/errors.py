"""All errors of the library, in one tree.

RealtimeError
├── UsageError                  the caller passed something invalid; also a ValueError
│   ├── InvalidConfiguration
│   ├── InvalidSource           pipe() or parts() got what is not a source; also a TypeError
│   ├── EncodingError           a value has no JSON form; also a TypeError
│   ├── InvalidPayload
│   ├── InvalidRequest
│   │   └── RequestCutOff       the client disconnected before it had sent the body
│   ├── UnknownTask
│   ├── TokenSpent
│   ├── NoCurrentRun            the call needs a run and got none; also a RuntimeError
│   └── LimitExceeded
├── TokenError                  the credential does not grant access
│   ├── InvalidToken
│   │   └── ExpiredToken
│   └── ScopeDenied
├── RunNotFound
│   └── RunKeptElsewhere        the run is in the memory of another process
├── StreamNotFound              a run completed without the stream that was read
├── LocalCopyLost
├── RunEnded                    a run ended without a result, or can no longer change; in run_errors.py
│   ├── RunFailed
│   └── RunCanceled
├── StateError                  the current state does not allow the operation
│   ├── RunExists               a run with the chosen id exists
│   ├── ThreadBusy              another run of the thread is active
│   ├── InvalidTransition
│   ├── StreamClosed
│   ├── StreamGap               entries that a reader requested were trimmed
│   ├── StreamBehind            a stream lacks entries that its broker acknowledged
│   ├── StreamLost              acknowledged entries are lost and cannot be restored
│   ├── VersionConflict         a concurrent change was stored first; in run_errors.py
│   └── ProducerGap
├── TaskError                   raised by a task; subscribers see its message
├── SourceFailed                a model reported a failure within its stream
├── AuthorizeFailed             the host's function that authorizes a request failed
├── ServerShutdown              the server shut down
└── BrokerUnavailable           the broker does not respond
    └── RestoreOutOfOrder       the writer must wait for other producers to restore their entries

`status` suggests an HTTP status, and `code` is a stable word for programs. The message names the value that was wrong
and what is allowed. No message contains a token or a secret.
"""

from __future__ import annotations

from typing import Any, ClassVar

_SHOWN_LENGTH = 80


def shown(value: object) -> str:
    """A value for an error message: text quoted and truncated, a number, True, False or None, else the type."""
    if isinstance(value, str):
        return repr(value) if len(value) <= _SHOWN_LENGTH else f"{value[:_SHOWN_LENGTH]!r}…"
    return repr(value) if value is None or isinstance(value, int | float) else f"a {type(value).__name__}"


class RealtimeError(Exception):
    """The base class of all errors of this library."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without calling `__init__`, because some subclasses require more arguments than `args`."""
        return _unpickle, (type(self), self.args), self.__dict__


def _unpickle(cls: type[RealtimeError], args: tuple[Any, ...]) -> RealtimeError:
    return cls.__new__(cls, *args)


class UsageError(RealtimeError, ValueError):
    """The caller passed an invalid value."""

    status = 422
    code = "invalid"


class InvalidConfiguration(UsageError):
    """The settings of a `Realtime` are invalid."""

    code = "invalid_configuration"


class InvalidSource(UsageError, TypeError):
    """`pipe()` got an object that it cannot iterate, or `parts()` the stream or the item of an unknown library."""

    code = "invalid_source"


class EncodingError(UsageError, TypeError):
    """A value has no JSON form. The message names its type and, for a chunk, its index."""

    code = "not_encodable"


class InvalidPayload(UsageError):
    """A payload does not match the annotation of its task."""

    code = "invalid_payload"


class InvalidRequest(UsageError):
    """A request's path, query, header or body is malformed."""

    status = 400
    code = "invalid_request"


class RequestCutOff(InvalidRequest):
    """The client disconnected while it sent the body. A proxy can still forward this response, so its status is one
    that clients retry."""

    status = 408
    code = "cut_off"


class UnknownTask(UsageError):
    """No task has this id."""

    status = 404
    code = "unknown_task"


class TokenSpent(UsageError):
    """Another request has used this one-time token."""

    code = "token_spent"


class NoCurrentRun(UsageError, RuntimeError):
    """The call needs a run: none was passed, and the code does not execute in one."""

    code = "no_current_run"


class LimitExceeded(UsageError):
    """A limit was exceeded. The message names the value and the limit; `status` is 413, 422, 429 or 503.

    `retry_after_s` is when a repeated call can succeed, if that is known; otherwise None.
    """

    code = "limit_exceeded"

    def __init__(self, message: str, *, status: int = 422, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status = status  # type: ignore[misc]
        self.retry_after_s = retry_after_s


class TokenError(RealtimeError):
    """The credential does not grant access."""

    status = 401
    code = "unauthorized"


class InvalidToken(TokenError):
    """A token is missing, malformed, forged or signed with another key."""

    code = "invalid_token"


class ExpiredToken(InvalidToken):
    """A token has expired."""

    code = "token_expired"


class ScopeDenied(TokenError):
    """A valid token lacks the scope for this request."""

    status = 403
    code = "forbidden"


class RunNotFound(RealtimeError):
    """No run has this id: it does not exist or has expired (`Retention.after_end`)."""

    status = 404
    code = "run_not_found"


class RunKeptElsewhere(RunNotFound):
    """The run is in the memory of another process, the one that created the token."""

    code = "run_kept_elsewhere"


class StreamNotFound(RealtimeError):
    """The run completed and has other streams, but not this one. Its name is probably misspelled."""

    status = 404
    code = "stream_not_found"


class LocalCopyLost(RealtimeError):
    """The local copy of a `Pipe` was dropped because it was full and was not read. Subscribers lost nothing."""

    code = "local_copy_lost"


class StateError(RealtimeError):
    """The current state of a run or stream does not allow the operation."""

    status = 409
    code = "conflict"


class RunExists(StateError):
    """A run has this id already, or had it and has expired. An id is for one run."""

    code = "run_exists"

    def __init__(self, run_id: str) -> None:
        super().__init__(f"a run {shown(run_id)} exists already or has expired; choose another run_id, or use that run")


class ThreadBusy(StateError):
    """Another run of the thread is active. `run_id` is its id."""

    code = "thread_busy"

    def __init__(self, thread: str, run_id: str) -> None:
        super().__init__(
            f"thread {shown(thread)} has an active run, {run_id}; wait until it ends, or replace it (on_conflict)"
        )
        self.thread = thread
        self.run_id = run_id


class InvalidTransition(StateError):
    """The status of a run cannot change to the requested one."""

    code = "invalid_transition"


class StreamClosed(StateError):
    """The stream has ended, usually because its run is over."""

    code = "stream_closed"


class StreamGap(StateError):
    """Entries after the reader's cursor were trimmed. `first` is the oldest retained seq."""

    status = 410
    code = "stream_gap"

    def __init__(self, message: str, *, requested: int, first: int) -> None:
        super().__init__(message)
        self.requested = requested
        self.first = first


class StreamBehind(StateError):
    """A stream lacks entries that the broker acknowledged. Its writer can sometimes restore them."""

    code = "stream_behind"


class StreamLost(StateError):
    """Acknowledged entries are lost and cannot be restored at their old seqs."""

    code = "stream_lost"


class ProducerGap(StateError):
    """A producer's append starts after the index that the stream expects next from it."""

    code = "producer_gap"

    def __init__(self, message: str, *, expected: int) -> None:
        super().__init__(message)
        self.expected = expected


class TaskError(RealtimeError):
    """Raise this in a task to fail its run with a message that subscribers see.

    The messages of all other exceptions are hidden from subscribers, unless `Realtime(debug=True)`. `data` stays on the
    exception and is never published.
    """

    code = "task_error"

    def __init__(self, message: str, *, data: Any = None) -> None:
        super().__init__(message)
        self.data = data


class SourceFailed(RealtimeError):
    """A model or an agent reported a failure within its stream. The message is the model's, so it is not for users."""

    status = 502
    code = "source_failed"


class AuthorizeFailed(RealtimeError):
    """The host's function that authorizes a request without a token raised, or did not return in time."""

    status = 503
    code = "authorize_failed"

    def __init__(self, message: str = "the server could not check the session; try again") -> None:
        super().__init__(message)


class ServerShutdown(RealtimeError):
    """The server shut down. Its unfinished runs end FAILED with this error."""

    status = 503
    code = "server_shutdown"

    def __init__(self, message: str = "the server was shut down") -> None:
        super().__init__(message)


class BrokerUnavailable(RealtimeError):
    """The broker does not respond. Whether the call took effect is unknown; it can be repeated unchanged."""

    status = 503
    code = "broker_unavailable"


class RestoreOutOfOrder(BrokerUnavailable):
    """The writer must wait: earlier entries, lost by other producers, have not been restored yet."""
