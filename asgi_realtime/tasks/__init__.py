"""Task registration, validation, exactly-one launch, execution, queue adapters."""

from __future__ import annotations

from asgi_realtime.engine.executor import AttachedExecutor, Executor, ExecutorHost, InProcessExecutor
from asgi_realtime.tasks.task import AsyncTask, SyncTask, Task

__all__ = ["AsyncTask", "AttachedExecutor", "Executor", "ExecutorHost", "InProcessExecutor", "SyncTask", "Task"]
