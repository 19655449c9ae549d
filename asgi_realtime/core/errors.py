"""Every error of the library, in one tree.

RealtimeError
├── UsageError                  the caller's mistake; also a ValueError
│   ├── InvalidConfiguration
│   ├── InvalidSource           pipe() was given something that is no source; also a TypeError
│   ├── EncodingError           a value has no JSON form; also a TypeError
│   ├── InvalidPayload
│   ├── InvalidRequest
│   │   └── RequestCutOff       the client was gone before its body had come
│   ├── UnknownTask
│   ├── TokenSpent
│   ├── NoCurrentRun            a run was needed and none was named; also a RuntimeError
│   └── LimitExceeded
├── TokenError                  the credential
│   ├── InvalidToken
│   │   └── ExpiredToken
│   └── ScopeDenied
├── RunNotFound
│   └── RunKeptElsewhere        it is in the memory of another process
├── LocalCopyLost
├── RunEnded                    how a run ended, raised to its waiters; see run_errors.py
│   ├── RunFailed
│   └── RunCanceled
├── StateError                  an operation that the present state does not allow
│   ├── InvalidTransition
│   ├── StreamClosed
│   ├── StreamGap               entries that a reader asked for are past their retention
│   ├── StreamBehind            a stream is shorter than what its broker had acknowledged
│   ├── StreamLost              entries that were acknowledged are lost, and cannot be written again
│   ├── VersionConflict         a concurrent change was stored first; in run_errors.py, as RunEnded
│   └── ProducerGap
├── TaskError                   raised by a task: its message is shown to subscribers
├── ServerShutdown              a run was stopped because its server stopped
└── BrokerUnavailable           the environment
    └── RestoreOutOfOrder       a writer has to wait for others to restore what was lost

`status` is a hint for whoever answers over HTTP and `code` a stable word for programs; the message says what was
wrong and what is allowed. No message carries a token or a secret.
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
    """The base of all errors of this library."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"

    def __reduce__(self) -> tuple[Any, ...]:
        """As it is, without `__init__`, which for some wants more than `args`: errors go from process to process."""
        return _as_it_was, (type(self), self.args), self.__dict__


def _as_it_was(cls: type[RealtimeError], args: tuple[Any, ...]) -> RealtimeError:
    return cls.__new__(cls, *args)


class UsageError(RealtimeError, ValueError):
    """The caller passed something that is not allowed."""

    status = 422
    code = "invalid"


class InvalidConfiguration(UsageError):
    """A `Realtime` cannot be built from these settings."""

    code = "invalid_configuration"


class InvalidSource(UsageError, TypeError):
    """`pipe()` was given something that it cannot iterate, or that would be iterated by accident."""

    code = "invalid_source"


class EncodingError(UsageError, TypeError):
    """A value has no JSON form. Names the type and, for a chunk, its index."""

    code = "not_encodable"


class InvalidPayload(UsageError):
    """A payload does not fit the annotation of its task."""

    code = "invalid_payload"


class InvalidRequest(UsageError):
    """A request's path, query, header or body is malformed."""

    status = 400
    code = "invalid_request"


class RequestCutOff(InvalidRequest):
    """The body of a request broke off. Mostly nobody hears this; what is in between may hand it on, so it is not a
    status that is final."""

    status = 408
    code = "cut_off"


class UnknownTask(UsageError):
    """No task is registered under this id."""

    status = 404
    code = "unknown_task"


class TokenSpent(UsageError):
    """A one-time token was used before, by another request."""

    code = "token_spent"


class NoCurrentRun(UsageError, RuntimeError):
    """A run was needed, none was passed and none is current."""

    code = "no_current_run"


class LimitExceeded(UsageError):
    """A limit was exceeded. Says the value and the limit; `status` is the HTTP status that fits (413, 422, 429, …)."""

    code = "limit_exceeded"

    def __init__(self, message: str, *, status: int = 422) -> None:
        super().__init__(message)
        self.status = status  # type: ignore[misc]


class TokenError(RealtimeError):
    """The credential does not admit the request."""

    status = 401
    code = "unauthorized"


class InvalidToken(TokenError):
    """A token is missing, malformed, forged or foreign."""

    code = "invalid_token"


class ExpiredToken(InvalidToken):
    """A token was valid and is no longer."""

    code = "token_expired"


class ScopeDenied(TokenError):
    """A valid token whose scopes do not admit this."""

    status = 403
    code = "forbidden"


class RunNotFound(RealtimeError):
    """No run has this id, or it is past its retention."""

    status = 404
    code = "run_not_found"


class RunKeptElsewhere(RunNotFound):
    """The run is in the memory of another process: the one that made the token."""

    code = "run_kept_elsewhere"


class LocalCopyLost(RealtimeError):
    """The local copy of a `Pipe` was given up because it was full and nobody read it. Subscribers lost nothing."""

    code = "local_copy_lost"


class StateError(RealtimeError):
    """The present state of a run or stream does not allow this."""

    status = 409
    code = "conflict"


class InvalidTransition(StateError):
    """A run cannot go from its status to that one."""

    code = "invalid_transition"


class StreamClosed(StateError):
    """The stream is closed: its run is over."""

    code = "stream_closed"


class StreamGap(StateError):
    """Entries after the reader's cursor are no longer there. `first` is the oldest that is."""

    status = 410
    code = "stream_gap"

    def __init__(self, message: str, *, requested: int, first: int) -> None:
        super().__init__(message)
        self.requested = requested
        self.first = first


class StreamBehind(StateError):
    """A stream is shorter than what was acknowledged to its writer, who may be able to write it again."""

    code = "stream_behind"


class StreamLost(StateError):
    """Entries that the broker had acknowledged are lost, and cannot be written again where they stood."""

    code = "stream_lost"


class ProducerGap(StateError):
    """A producer's append starts behind the next index that the stream expects of it."""

    code = "producer_gap"

    def __init__(self, message: str, *, expected: int) -> None:
        super().__init__(message)
        self.expected = expected


class TaskError(RealtimeError):
    """Raise it in a task to fail its run with a message that subscribers may see.

    The messages of all other exceptions are withheld from them, unless `Realtime(debug=True)`.
    `data` is for the raising code only and goes nowhere.
    """

    code = "task_error"

    def __init__(self, message: str, *, data: Any = None) -> None:
        super().__init__(message)
        self.data = data


class ServerShutdown(RealtimeError):
    """The server shut down. Its unfinished runs end FAILED with this error."""

    status = 503
    code = "server_shutdown"

    def __init__(self, message: str = "the server was shut down") -> None:
        super().__init__(message)


class BrokerUnavailable(RealtimeError):
    """The broker does not answer. Nothing is known of the call that raised it, so it may be retried as it was."""

    status = 503
    code = "broker_unavailable"


class RestoreOutOfOrder(BrokerUnavailable):
    """What a writer writes again has its place behind what others lost, and have not written again yet."""
