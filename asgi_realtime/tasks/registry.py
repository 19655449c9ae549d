"""The registered tasks of a `Realtime`: trigger them, and execute what was triggered.

A trigger is checked (`records`), stored, and handed to the executor (`launch`), alone or as part of a batch
(`batches`). The executor then calls `execute`, in this process or in another one. That calls the function of the task
inside its run, and ends the run by the outcome.
"""

from __future__ import annotations

import builtins
import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any, Unpack

import anyio

from asgi_realtime.core.chunks import decode
from asgi_realtime.core.config import Retention, Span, parse_span
from asgi_realtime.core.errors import InvalidConfiguration, InvalidTransition, UnknownTask, UsageError
from asgi_realtime.core.names import check_key, check_run_id
from asgi_realtime.core.run_changes import Started
from asgi_realtime.core.runs import RunError, StoredRecord
from asgi_realtime.engine.engine import Engine
from asgi_realtime.engine.execution import Execution
from asgi_realtime.engine.executor import AttachedExecutor, Executor, InProcessExecutor
from asgi_realtime.engine.on_end import OnEnd
from asgi_realtime.engine.run import current_run_of, enter
from asgi_realtime.loop.failures import cancelled_itself, is_failure
from asgi_realtime.loop.threads import TaskThreads
from asgi_realtime.tasks.batches import Batches, BatchItem, TriggeredBatch, check_item
from asgi_realtime.tasks.budgets import Budgets
from asgi_realtime.tasks.launch import Launched, Launcher
from asgi_realtime.tasks.options import RunOptions, UnwatchedOptions, unwatched_fields
from asgi_realtime.tasks.records import Payload, Prepared, RecordFactory
from asgi_realtime.tasks.task import Task, TaskLike, class_of, id_of

_LARGE_BYTES = 64 * 1024
"""Payloads of this size are decoded in turn. The runs of a batch start together."""


def _is_interactive() -> bool:
    """Whether this is a notebook, IPython or the interactive interpreter."""
    return hasattr(sys, "ps1") or hasattr(builtins, "__IPYTHON__")


class Tasks:
    """Tasks by their id."""

    def __init__(self, engine: Engine, executor: Executor | None, *, retention: Retention) -> None:
        self._engine = engine
        self._runs = engine.runs
        self._limits = engine.limits
        self.budgets = Budgets(engine.runs, engine.limits)
        self.launcher = Launcher(engine, self.budgets, retention=retention)
        self.batches = Batches(engine, self.launcher, self.budgets, retention=retention)
        self.records = RecordFactory(engine, retention=retention)
        self._tasks: dict[str, Task[Any, Any]] = {}
        self._threads: TaskThreads | None = None
        dispatcher = engine.dispatcher
        dispatcher.in_process = InProcessExecutor(
            self.execute, self._tasks, spawn=engine.spawn_detached, on_end=lambda: engine.executions.changed.wake()
        )
        dispatcher.executor = executor or dispatcher.in_process
        engine.on_ends.of_task = self._on_end_of
        if isinstance(executor, AttachedExecutor):
            executor.attach(self)

    async def start(self) -> None:
        """Start the `Realtime` in a process that only executes runs: the worker of a queue."""
        self._engine.shutdown.leave_signals()
        await self._engine.ensure_started(lazy=False)

    async def stop(self) -> None:
        """Stop the `Realtime`. Runs that execute here have `timeouts.drain` to end before they are canceled."""
        await self._engine.stop()

    def register(
        self,
        task_id: str,
        function: Callable[..., Any],
        *,
        max_duration: Span | None,
        concurrency_limit: int | None,
        on_end: OnEnd | None = None,
        **unwatched: Unpack[UnwatchedOptions],
    ) -> Task[Any, Any]:
        """Add a task. Raises `InvalidConfiguration` for an id that is taken and for a signature that no task has.

        In an interactive session an id can be registered again, because notebook cells are executed again. The new task
        replaces the old one, for runs that wait too.
        """
        check_key(task_id, self._limits, what="task id")
        if task_id in self._tasks and not _is_interactive():
            raise InvalidConfiguration(f"a task {task_id!r} is registered already; ids must differ")
        if concurrency_limit is not None and (type(concurrency_limit) is not int or concurrency_limit < 1):
            raise InvalidConfiguration(f"concurrency_limit is {concurrency_limit!r}; it must be 1 or more")
        task = self._tasks[task_id] = class_of(function)(
            task_id,
            function,
            max_duration_s=None if max_duration is None else parse_span(max_duration, name="max_duration"),
            concurrency_limit=concurrency_limit or self._limits.task_concurrency,
            on_end=on_end,
            unwatched=unwatched_fields(unwatched),
        )
        return task

    def get(self, task_id: str) -> Task[Any, Any]:
        """The registered task. Raises `UnknownTask`."""
        found = self._tasks.get(task_id)
        if found is None:
            known = ", ".join(sorted(self._tasks)) or "none"
            raise UnknownTask(f"no task {task_id!r} is registered; registered: {known}")
        return found

    def _on_end_of(self, task_id: str) -> OnEnd | None:
        task = self._tasks.get(task_id)
        return None if task is None else task.on_end

    # Trigger

    async def trigger(
        self, task: TaskLike, payload: Any, options: RunOptions, *, parent_id: str | None, run_id: str | None
    ) -> Launched:
        prepared = self.prepare(task, payload, options)
        if run_id is not None:
            if prepared.record.idempotency_key is not None:
                raise UsageError("run_id= and idempotency_key= both identify the run; pass one of them")
            prepared = prepared.renamed(check_run_id(run_id, self._limits))
        await self._engine.ensure_started()
        launch = self.launcher.launch if run_id is None else self.launcher.launch_named
        return await launch(prepared.under(await self._parent(parent_id)))

    async def batch_trigger(self, items: Iterable[BatchItem]) -> TriggeredBatch:
        prepared = [self.prepare(*check_item(item)) for item in items]
        self.batches.check_count(len(prepared))
        await self._engine.ensure_started()
        parent = await self._parent(None)
        return await self.batches.trigger([item.under(parent) for item in prepared])

    def prepare(self, task: TaskLike, payload: Any, options: RunOptions) -> Prepared:
        """Check a run and build its record. Raises before anything is stored."""
        found = self.get(id_of(task))
        encoded = found.encode_payload(payload, limit_bytes=self._limits.payload_bytes)
        return self.records.new_triggered_run(found, Payload(encoded), options)

    def prepare_json(
        self,
        task_id: str,
        payload: Payload,
        options: RunOptions,
        *,
        parent: StoredRecord | None,
        owner: str | None,
    ) -> Prepared:
        """As `prepare`, for a payload that is valid JSON already. `parent` is the run that triggers it, and `owner` the
        owner of the public token of the request, or None for the secret key."""
        found = self.get(task_id)
        found.check_payload(payload.json, limit_bytes=self._limits.payload_bytes, is_valid=True)
        return self.records.new_triggered_run(found, payload, options).under(parent).triggered_by(owner)

    async def _parent(self, parent_id: str | None) -> StoredRecord | None:
        """The run that triggers another: the one named, or the current one."""
        if parent_id is not None:
            return await self._runs.get(parent_id)
        run = current_run_of(self._runs)
        return None if run is None else run.record

    # Execute

    async def execute(self, run_id: str) -> None:
        """Claim a run and execute its task. Returns at once if the run is not QUEUED."""
        await self._engine.ensure_started()
        record = await self._runs.get(run_id)
        task = await self._task_of(record)
        try:
            record = await self._runs.update(run_id, Started(self._runs.owner), known=record)
        except InvalidTransition:
            return
        if record.is_completed:
            return
        turn = self._engine.begin().turn
        execution = await self._engine.executions.start(record)
        try:
            await _run_task(task, execution, threads=self._task_threads, turn=turn)
        finally:
            self._engine.executions.remove(execution)

    async def _task_of(self, record: StoredRecord) -> Task[Any, Any]:
        try:
            return self.get(record.task)
        except UnknownTask:
            dispatcher = self._engine.dispatcher
            if dispatcher.executor is not dispatcher.in_process:  # the queue has already removed the run
                await dispatcher.fail_unstarted(record.id, RunError("UnknownTask", "the worker does not know the task"))
            raise

    def _task_threads(self) -> TaskThreads:
        supervisor = self._engine.begin()
        if self._threads is None or self._threads.supervisor is not supervisor:
            self._threads = TaskThreads(self._limits.task_threads, supervisor)
        return self._threads

    def decode_output(self, record: StoredRecord) -> Any:
        """The output of a run, in the type that its task declares if the task is registered here."""
        if record.output_json is None:
            return None
        task = self._tasks.get(record.task)
        return decode(record.output_json) if task is None else task.decode_output(record.output_json)


async def _run_task(
    task: Task[Any, Any], execution: Execution, *, threads: Callable[[], TaskThreads], turn: anyio.Lock
) -> StoredRecord:
    """Call the task and end its run. Returns the last record.

    `threads` returns the pool for `def` functions, and `turn` is held while a large payload is decoded. Cancelling the
    caller cancels the run, and propagates once that is stored.
    """
    limits = [seconds for seconds in (task.max_duration_s, execution.run.record.max_duration_s) if seconds is not None]
    max_duration_s = min(limits, default=None)
    leave = enter(execution.run)
    try:
        with anyio.CancelScope() as scope:
            execution.interrupt = scope.cancel
            if max_duration_s is not None:
                scope.deadline = anyio.current_time() + max_duration_s
            try:
                output = await _call(task, execution, threads, turn)
                if output is not None or execution.run.output_json is None:
                    execution.run.output_json = execution.run.encode_output(output)
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
        leave()


async def _call(
    task: Task[Any, Any], execution: Execution, threads: Callable[[], TaskThreads], turn: anyio.Lock
) -> Any:
    run = execution.run
    if task.takes_payload:
        run.use_payload(await _payload(task, run.record.payload_json or b"null", turn))
    call = functools.partial(task.function, *task.arguments(run))
    if task.is_async:
        return await call()
    return await threads().run(call)


async def _payload(task: Task[Any, Any], data: bytes, turn: anyio.Lock) -> Any:
    if len(data) < _LARGE_BYTES:
        return task.decode_payload(data)
    async with turn:
        return task.decode_payload(data)
