"""Live run updates and LLM token streams for any ASGI app, in the app's own process."""

from __future__ import annotations

from asgi_realtime.asgi import (
    RealtimeMiddleware,
    RedactAccessToken,
    realtime_error_handler,
    realtime_error_response,
)
from asgi_realtime.calls.typed import StreamWriterContext, TypedStream
from asgi_realtime.core.access import Grant, Resource
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
    RunExists,
    RunKeptElsewhere,
    RunNotFound,
    ScopeDenied,
    ServerShutdown,
    SourceFailed,
    StreamBehind,
    StreamClosed,
    StreamGap,
    StreamLost,
    StreamNotFound,
    TaskError,
    ThreadBusy,
    UnknownTask,
    UsageError,
)
from asgi_realtime.core.run_errors import RunCanceled, RunEnded, RunFailed
from asgi_realtime.core.run_record import RunRecord
from asgi_realtime.core.runs import RunError, Status
from asgi_realtime.engine.on_end import RunEnd, SyncRunEnd
from asgi_realtime.engine.run import Run, current_run
from asgi_realtime.engine.sync_pipe import SyncPipe
from asgi_realtime.realtime import Realtime
from asgi_realtime.runs.handles import BatchHandle, RunHandle
from asgi_realtime.streams.followers import StreamChunk
from asgi_realtime.streams.pipe import Pipe, PipeResult
from asgi_realtime.tasks import Executor, Task
from asgi_realtime.tokens import Claims

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
    "Grant",
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
    "Resource",
    "RestoreOutOfOrder",
    "Retention",
    "Run",
    "RunCanceled",
    "RunEnd",
    "RunEnded",
    "RunError",
    "RunExists",
    "RunFailed",
    "RunHandle",
    "RunKeptElsewhere",
    "RunNotFound",
    "RunRecord",
    "ScopeDenied",
    "ServerShutdown",
    "SourceFailed",
    "Status",
    "StreamBehind",
    "StreamChunk",
    "StreamClosed",
    "StreamGap",
    "StreamLost",
    "StreamNotFound",
    "StreamWriterContext",
    "SyncPipe",
    "SyncRunEnd",
    "Task",
    "TaskError",
    "ThreadBusy",
    "Timeouts",
    "TypedStream",
    "UnknownTask",
    "UsageError",
    "current_run",
    "realtime_error_handler",
    "realtime_error_response",
]
