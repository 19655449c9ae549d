"""Tasks: functions that are triggered by id, what runs them, and how a run begins and ends."""

from __future__ import annotations

from asgi_realtime.engine.executor import AttachedExecutor, Executor, ExecutorHost, InProcessExecutor
from asgi_realtime.tasks.task import Task

__all__ = ["AttachedExecutor", "Executor", "ExecutorHost", "InProcessExecutor", "Task"]
