"""Calls the function of a task inside its run, and ends the run by the outcome."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import anyio

from asgi_realtime.core.runs import RunRecord
from asgi_realtime.engine.execution import Execution
from asgi_realtime.engine.run import current
from asgi_realtime.loop.failures import cancelled_itself, is_failure
from asgi_realtime.loop.threads import TaskThreads
from asgi_realtime.tasks.task import Task


async def run_task(task: Task[Any, Any], execution: Execution, *, threads: Callable[[], TaskThreads]) -> RunRecord:
    """Call the task and end its run. Returns the last record.

    `threads` returns the pool for `def` functions. Cancelling the caller cancels the run, and propagates once that is
    stored.
    """
    limits = [seconds for seconds in (task.max_duration_s, execution.run.record.max_duration_s) if seconds is not None]
    max_duration_s = min(limits, default=None)
    token = current.set(execution.run)
    try:
        with anyio.CancelScope() as scope:
            execution.interrupt = scope.cancel
            if max_duration_s is not None:
                scope.deadline = anyio.current_time() + max_duration_s
            try:
                output = await _call(task, execution, threads)
                if output is not None or execution.run.output_json is None:
                    execution.run.set_output(output)
                return await execution.finish_returned()
            except BaseException as exc:
                if not is_failure(exc):
                    raise
                return await execution.finish_failed(exc)  # `SystemExit` in a task does not end the server
        if execution.stopped_by is None and max_duration_s is not None:
            return await execution.finish_timed_out(max_duration_s)
        return await execution.finish_stopped()
    except BaseException as exc:
        if execution.is_ending or isinstance(exc, KeyboardInterrupt | GeneratorExit):
            raise
        # On trio the scope removes its cancellation from an exception group, and the other exceptions arrive here.
        if is_failure(exc) or (isinstance(exc, anyio.get_cancelled_exc_class()) and cancelled_itself()):
            return await execution.finish_failed(exc)
        await execution.finish_stopped()
        raise
    finally:
        execution.interrupt = None
        current.reset(token)


async def _call(task: Task[Any, Any], execution: Execution, threads: Callable[[], TaskThreads]) -> Any:
    run = execution.run
    payload = task.decode_payload(run.record.payload_json or b"null") if task.takes_payload else None
    call = functools.partial(task.function, *task.arguments(payload, run))
    if task.is_async:
        return await call()
    return await threads().run(call)
