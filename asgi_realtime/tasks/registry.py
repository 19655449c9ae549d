"""The registered tasks of a `Realtime`: triggering them, and executing what was triggered.

What is triggered is checked (`records`), stored, and handed to the executor (`launch`), one by one or as a batch
(`batches`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import msgspec

from asgi_realtime.core.chunks import decode
from asgi_realtime.core.config import Retention, Span, parse_span
from asgi_realtime.core.errors import InvalidConfiguration, InvalidTransition, UnknownTask
from asgi_realtime.core.names import check_key
from asgi_realtime.core.runs import RunError, RunRecord, Started
from asgi_realtime.engine.engine import Engine
from asgi_realtime.engine.executor import AttachedExecutor, Executor, InProcessExecutor
from asgi_realtime.engine.run import current
from asgi_realtime.loop.threads import TaskThreads
from asgi_realtime.runs.handles import BatchHandle, ResultWaiter, RunHandle
from asgi_realtime.tasks.batches import Batches, BatchItem, check_item
from asgi_realtime.tasks.launch import Launcher
from asgi_realtime.tasks.records import Payload, Prepared, Records, RunOptions
from asgi_realtime.tasks.runner import run_task
from asgi_realtime.tasks.task import Task, TaskLike, id_of


class MakeHandle(Protocol):
    """Makes the handle of a run."""

    def __call__(self, run_id: str, *, is_cached: bool, expires_in: Span) -> RunHandle[Any]: ...


class Tasks:
    """Tasks by their id."""

    def __init__(
        self,
        engine: Engine,
        executor: Executor | None,
        *,
        retention: Retention,
        handle: MakeHandle,
        result: ResultWaiter,
    ) -> None:
        self._engine = engine
        self._runs = engine.runs
        self._limits = engine.limits
        self._handle = handle
        self._result = result
        self.launcher = Launcher(engine, retention=retention)
        self.batches = Batches(engine, self.launcher, retention=retention)
        self.records = Records(
            limits=engine.limits, retention=retention, now_ms=engine.runs.now_ms, owner=lambda: engine.owner
        )
        self._tasks: dict[str, Task[Any, Any]] = {}
        self._threads: TaskThreads | None = None
        engine.dispatcher.executor = executor or InProcessExecutor(
            self.execute,
            spawn=engine.spawn_detached,
            concurrency_limit=self._concurrency_limit,
            on_end=lambda: engine.executions.changed.wake(),
        )
        if isinstance(executor, AttachedExecutor):
            executor.attach(self)

    async def start(self) -> None:
        """Start the `Realtime`, for an executor whose process is not the host's but its worker's."""
        await self._engine.ensure_started(lazy=False)

    async def stop(self) -> None:
        """Stop it: what runs here may go on for `timeouts.drain`, and is cancelled then."""
        await self._engine.stop()

    def register(
        self, task_id: str, function: Callable[..., Any], *, max_duration: Span | None, concurrency_limit: int | None
    ) -> Task[Any, Any]:
        """Add a task. Raises `InvalidConfiguration` for a second one of the same id, or a signature that is none."""
        check_key(task_id, self._limits, what="task id")
        if task_id in self._tasks:
            raise InvalidConfiguration(f"a task {task_id!r} is registered already; ids must differ")
        if concurrency_limit is not None and (type(concurrency_limit) is not int or concurrency_limit < 1):
            raise InvalidConfiguration(f"concurrency_limit is {concurrency_limit!r}; it must be 1 or more")
        task = self._tasks[task_id] = Task(
            task_id,
            function,
            max_duration_s=None if max_duration is None else parse_span(max_duration, name="max_duration"),
            concurrency_limit=concurrency_limit or self._limits.task_concurrency,
        )
        return task

    def _concurrency_limit(self, task_id: str) -> int | None:
        task = self._tasks.get(task_id)
        return None if task is None else task.concurrency_limit

    def get(self, task: TaskLike) -> Task[Any, Any]:
        """The registered task. Raises `UnknownTask`, and `UsageError` for what names no task."""
        task_id = id_of(task)
        found = self._tasks.get(task_id)
        if found is None:
            known = ", ".join(sorted(self._tasks)) or "none"
            raise UnknownTask(f"no task {task_id!r} is registered; registered: {known}")
        return found

    # Trigger

    async def trigger(
        self, task: TaskLike, payload: Any, options: RunOptions, *, parent_id: str | None, token_expires_in: Span
    ) -> RunHandle[Any]:
        parse_span(token_expires_in, name="token_expires_in")
        prepared = self.prepare(task, payload, options)
        await self._engine.ensure_started()
        prepared = _under(prepared, await self._parent(parent_id))
        record, is_cached = await self.launcher.launch(prepared)
        return self._handle(record.id, is_cached=is_cached, expires_in=token_expires_in)

    async def batch_trigger(
        self, items: Iterable[BatchItem], *, token_expires_in: Span, mint: Callable[[Sequence[str], Span], str]
    ) -> BatchHandle:
        parse_span(token_expires_in, name="token_expires_in")
        prepared = [self.prepare(*check_item(item)) for item in items]
        self.batches.check_count(len(prepared))
        await self._engine.ensure_started()
        parent = await self._parent(None)
        return await self.batches.trigger(
            [_under(item, parent) for item in prepared],
            token_expires_in=token_expires_in,
            mint=mint,
            result=self._result,
        )

    def prepare(self, task: TaskLike, payload: Any, options: RunOptions) -> Prepared:
        """The run as it begins. Raises for everything that is not allowed, before anything happens."""
        found = self.get(task)
        encoded = found.encode_payload(payload, limit_bytes=self._limits.payload_bytes)
        return self.records.triggered(found, Payload(encoded), options)

    def prepare_json(
        self, task_id: str, payload: Payload, options: RunOptions, *, parent: RunRecord | None, token_id: str | None
    ) -> Prepared:
        """As `prepare`, for a payload that is JSON already, and is kept as it is. `parent` is the run that triggers it,
        if any, and `token_id` the token with which that is done."""
        found = self.get(task_id)
        found.check_payload(payload.json, limit_bytes=self._limits.payload_bytes)
        prepared = _under(self.records.triggered(found, payload, options), parent)
        return replace(prepared, record=msgspec.structs.replace(prepared.record, token_id=token_id))

    async def _parent(self, parent_id: str | None) -> RunRecord | None:
        """The run that triggers another: the one named, or the current one."""
        if parent_id is not None:
            return await self._runs.get(parent_id)
        run = current.get(None)
        return run.record if run is not None and run.belongs_to(self._runs) else None

    # Execute

    async def execute(self, run_id: str) -> None:
        """Claim a run and run its task. Returns at once if the run is not QUEUED."""
        await self._engine.ensure_started()
        try:
            task = self.get((await self._runs.get(run_id)).task)
        except UnknownTask as exc:
            if not isinstance(
                self._engine.dispatcher.executor, InProcessExecutor
            ):  # the queue does not have it any more
                await self._engine.dispatcher.fail_unstarted(
                    run_id, RunError("UnknownTask", "the worker does not know the task")
                )
            raise exc
        try:
            record = await self._runs.update(run_id, Started(self._engine.owner))
        except InvalidTransition:
            return
        if record.is_completed:
            return
        execution = await self._engine.executions.start(record)
        try:
            await run_task(task, execution, threads=self._task_threads())
        finally:
            self._engine.executions.remove(execution)

    def _task_threads(self) -> TaskThreads:
        supervisor = self._engine.begin()
        if self._threads is None or self._threads.supervisor is not supervisor:
            self._threads = TaskThreads(self._limits.task_threads, supervisor)
        return self._threads

    def decode_output(self, record: RunRecord) -> Any:
        """The output of a run, in the type that its task is annotated with, if the task is known here."""
        if record.output_json is None:
            return None
        task = self._tasks.get(record.task)
        return decode(record.output_json) if task is None else task.decode_output(record.output_json)


def _under(prepared: Prepared, parent: RunRecord | None) -> Prepared:
    """The run as a child of another, if there is one."""
    if parent is None:
        return prepared
    child = msgspec.structs.replace(
        prepared.record, parent_id=parent.id, root_id=parent.root_id or parent.id, depth=parent.depth + 1
    )
    return replace(prepared, record=child)
