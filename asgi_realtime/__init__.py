"""Live run updates and LLM token streams for any ASGI app, in the app's own process."""

from __future__ import annotations

from asgi_realtime.asgi import RealtimeMiddleware, RedactAccessToken
from asgi_realtime.core.config import EXPOSED_HEADERS, Cors, Limits, Retention, Timeouts
from asgi_realtime.core.errors import (
    BrokerUnavailable,
    EncodingError,
    ExpiredToken,
    InvalidConfiguration,
    InvalidPayload,
    InvalidSource,
    InvalidToken,
    LimitExceeded,
    LocalCopyLost,
    NoCurrentRun,
    RealtimeError,
    RequestCutOff,
    RestoreOutOfOrder,
    RunKeptElsewhere,
    RunNotFound,
    ScopeDenied,
    ServerShutdown,
    StreamBehind,
    StreamClosed,
    StreamGap,
    StreamLost,
    StreamNotFound,
    TaskError,
    UnknownTask,
    UsageError,
)
from asgi_realtime.core.run_errors import RunCanceled, RunEnded, RunFailed
from asgi_realtime.core.runs import RunError, RunRecord, Status
from asgi_realtime.engine.run import Run, current_run
from asgi_realtime.realtime import Realtime
from asgi_realtime.runs.handles import BatchHandle, RunHandle
from asgi_realtime.streams.followers import StreamChunk
from asgi_realtime.streams.pipe import Pipe, PipeResult
from asgi_realtime.tasks import Executor, Task
from asgi_realtime.tokens import Claims
from asgi_realtime.typed import StreamWriterContext, TypedStream

__version__ = "0.1.0"

__all__ = [
    "BatchHandle",
    "BrokerUnavailable",
    "Claims",
    "Cors",
    "EXPOSED_HEADERS",
    "EncodingError",
    "Executor",
    "ExpiredToken",
    "InvalidConfiguration",
    "InvalidPayload",
    "InvalidSource",
    "InvalidToken",
    "LimitExceeded",
    "Limits",
    "LocalCopyLost",
    "NoCurrentRun",
    "Pipe",
    "PipeResult",
    "Realtime",
    "RealtimeError",
    "RealtimeMiddleware",
    "RedactAccessToken",
    "RequestCutOff",
    "RestoreOutOfOrder",
    "Retention",
    "Run",
    "RunCanceled",
    "RunEnded",
    "RunError",
    "RunFailed",
    "RunHandle",
    "RunKeptElsewhere",
    "RunNotFound",
    "RunRecord",
    "ScopeDenied",
    "ServerShutdown",
    "Status",
    "StreamBehind",
    "StreamChunk",
    "StreamClosed",
    "StreamGap",
    "StreamLost",
    "StreamNotFound",
    "StreamWriterContext",
    "Task",
    "TaskError",
    "Timeouts",
    "TypedStream",
    "UnknownTask",
    "UsageError",
    "current_run",
]
