"""Task registration, validation, exactly-one launch, execution, queue adapters."""

from __future__ import annotations

from asgi_realtime.engine.executor import AttachedExecutor, Executor, ExecutorHost, InProcessExecutor
from asgi_realtime.tasks.task import Task

__all__ = ["AttachedExecutor", "Executor", "ExecutorHost", "InProcessExecutor", "Task"]
