"""The registered tasks of a `Realtime`: triggering them, and executing what was triggered.

A run is stored before it is handed to the executor, so whoever gets its id can find it. With an idempotency key the
key is claimed first: whoever finds the claim finds the run under it, or creates it under the same id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from asgi_realtime.config import Retention, Span, parse_span
from asgi_realtime.core.chunks import decode
from asgi_realtime.core.metadata import check_key as check_metadata_key
from asgi_realtime.core.metadata import check_size, normalize_value
from asgi_realtime.core.runs import BatchMember, CancelRequested, RunError, RunRecord, Started, Status
from asgi_realtime.engine import Engine
from asgi_realtime.errors import (
    InvalidConfiguration,
    InvalidTransition,
    LimitExceeded,
    RealtimeError,
    UnknownTask,
    UsageError,
    VersionConflict,
)
from asgi_realtime.handles import BatchHandle, ResultWaiter, RunHandle
from asgi_realtime.names import check_key, check_tags, new_batch_id, new_run_id
from asgi_realtime.run import current
from asgi_realtime.supervisor import logger
from asgi_realtime.tasks.executor import AttachedExecutor, Executor, InProcessExecutor
from asgi_realtime.tasks.runner import run_task
from asgi_realtime.tasks.task import Task
from asgi_realtime.tasks.threads import TaskThreads

TaskLike = Task[Any, Any] | str
BatchItem = tuple[TaskLike, Any] | tuple[TaskLike, Any, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What a run may be started with."""

    tags: str | Iterable[str] | None = None
    metadata: Mapping[str, Any] | None = None
    idempotency_key: str | None = None
    ttl: Span | None = None
    delay: Span | None = None


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
        self._retention = retention
        self._handle = handle
        self._result = result
        self._tasks: dict[str, Task[Any, Any]] = {}
        self._threads: TaskThreads | None = None
        engine.executor = executor or InProcessExecutor(
            self.execute,
            spawn=engine.spawn_detached,
            concurrency_limit=self._concurrency_limit,
            on_end=engine.wake,
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
        """The registered task. Raises `UnknownTask`."""
        task_id = task if isinstance(task, str) else task.id
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
        record = self._record(task, payload, options)
        await self._engine.ensure_started()
        record = await self._with_parent(record, parent_id)
        record, is_cached = await self._launch(record)
        return self._handle(record.id, is_cached=is_cached, expires_in=token_expires_in)

    async def batch_trigger(
        self, items: Iterable[BatchItem], *, token_expires_in: Span, mint: Callable[[Sequence[str], Span], str]
    ) -> BatchHandle:
        batch_id = new_batch_id()
        token = mint([f"read:batch:{batch_id}"], token_expires_in)
        records = [self._batch_record(item) for item in items]
        if not records:
            raise UsageError("a batch is empty; it needs at least one (task, payload)")
        if len(records) > self._limits.batch_runs:
            raise LimitExceeded(f"a batch has {len(records)} runs, limit {self._limits.batch_runs}")
        await self._engine.ensure_started()
        members = [
            await self._with_parent(
                msgspec.structs.replace(record, batch=BatchMember(batch_id, index, len(records))), None
            )
            for index, record in enumerate(records)
        ]
        await self._engine.begin().shielded(lambda: self._launch_all(members))
        return BatchHandle(batch_id, token, runs=[member.id for member in members], result=self._result)

    async def _launch_all(self, members: Sequence[RunRecord]) -> None:
        """Launch the runs of a batch. If one fails those before it are canceled, so that the batch is over."""
        for index, member in enumerate(members):
            try:
                await self._create(member)
            except Exception:
                for launched in members[:index]:
                    await self._cancel_launched(launched.id)
                raise

    async def _cancel_launched(self, run_id: str) -> None:
        try:
            await self._runs.update(run_id, CancelRequested())
        except RealtimeError as exc:
            logger.warning("run %s of a batch that failed could not be canceled: %s", run_id, exc)
            return
        execution = self._engine.executions.get(run_id)
        if execution is not None:
            execution.cancel()

    def _batch_record(self, item: BatchItem) -> RunRecord:
        if not isinstance(item, tuple | list) or len(item) not in (2, 3):
            raise UsageError(f"a batch item is {item!r}; allowed are (task, payload) and (task, payload, options)")
        task, payload, *rest = item
        allowed = {"tags", "metadata", "ttl", "delay"}
        options = dict(rest[0]) if rest else {}
        if not set(options) <= allowed:
            unknown = ", ".join(sorted(set(options) - allowed))
            raise UsageError(f"batch item options {unknown} are not known; allowed: {', '.join(sorted(allowed))}")
        return self._record(task, payload, RunOptions(**options))

    def _record(self, task: TaskLike, payload: Any, options: RunOptions) -> RunRecord:
        """The run as it begins. Raises for everything that is not allowed, before anything happens."""
        found = self.get(task)
        payload_json = found.encode_payload(payload, limit_bytes=self._limits.payload_bytes)
        record = self.open_record(found.id, tags=options.tags, metadata=options.metadata)
        now_ms = record.created_at_ms
        delay_ms = 0 if options.delay is None else round(parse_span(options.delay, name="delay") * 1000)
        ttl_s = None if options.ttl is None else parse_span(options.ttl, name="ttl")
        return msgspec.structs.replace(
            record,
            status=Status.DELAYED if delay_ms else Status.QUEUED,
            owner=None,
            started_at_ms=None,
            queued_at_ms=None if delay_ms else now_ms,
            delay_until_ms=now_ms + delay_ms if delay_ms else None,
            ttl_s=ttl_s,
            expires_at_ms=None if ttl_s is None else now_ms + delay_ms + round(ttl_s * 1000),
            max_duration_s=found.max_duration_s,
            payload_json=payload_json,
            idempotency_key=self._checked_key(options.idempotency_key),
        )

    def open_record(
        self, name: str, *, tags: str | Iterable[str] | None, metadata: Mapping[str, Any] | None
    ) -> RunRecord:
        """A run that this process executes from its begin on."""
        now_ms = self._runs.now_ms()
        run_id = new_run_id()
        return RunRecord(
            id=run_id,
            task=check_key(name, self._limits, what="task id"),
            status=Status.EXECUTING,
            created_at_ms=now_ms,
            updated_at_ms=now_ms,
            started_at_ms=now_ms,
            tags=check_tags(tags, self._limits),
            metadata=self._checked_metadata(metadata),
            root_id=run_id,
            owner=self._engine.owner,
        )

    def _checked_metadata(self, metadata: Mapping[str, Any] | None) -> dict[str, Any]:
        if metadata is None:
            return {}
        if not isinstance(metadata, Mapping):
            raise UsageError(f"metadata is a {type(metadata).__name__}; allowed is a dict")
        for key in metadata:
            check_metadata_key(key)
        normal: dict[str, Any] = normalize_value(dict(metadata))
        check_size(normal, self._limits.metadata_bytes)
        return normal

    def _checked_key(self, key: str | None) -> str | None:
        if key is None:
            return None
        if not isinstance(key, str) or not key:
            raise UsageError(f"idempotency_key is {key!r}; allowed is a str that is not empty")
        if len(key) > self._limits.idempotency_key_length:
            limit = self._limits.idempotency_key_length
            raise LimitExceeded(f"idempotency_key is {len(key)} characters, limit {limit}")
        return key

    async def _with_parent(self, record: RunRecord, parent_id: str | None) -> RunRecord:
        """The record as a child of the run that triggers it: the one named, or the current one."""
        if parent_id is not None:
            parent = await self._runs.get(parent_id)
        else:
            run = current.get(None)
            if run is None or not run.belongs_to(self._runs):
                return record
            parent = run.record
        return msgspec.structs.replace(
            record, parent_id=parent.id, root_id=parent.root_id or parent.id, depth=parent.depth + 1
        )

    async def _launch(self, record: RunRecord) -> tuple[RunRecord, bool]:
        """Store a run and hand it to the executor; or find the one that its idempotency key stands for."""
        if record.claim is not None:
            run_id, found = await self._claimed(record.claim, record.id)
            if found is not None:
                return found, True
            record = msgspec.structs.replace(record, id=run_id, root_id=record.root_id and _root(record, run_id))
        launched: list[tuple[RunRecord, bool]] = []

        async def launch() -> None:
            launched.append(await self._create(record))

        await self._engine.begin().shielded(launch)  # a run that is stored and not queued would wait for ever
        return launched[0]

    async def _create(self, record: RunRecord) -> tuple[RunRecord, bool]:
        try:
            await self._runs.create(record)
        except VersionConflict as conflict:
            if record.idempotency_key is None or conflict.current is None:
                raise
            return conflict.current, True
        if record.status is Status.QUEUED:
            try:
                await self._engine.enqueue(record)
            except Exception:
                await self._engine.end_waiting(record.id, RunError("NotQueued", "the executor did not take the run"))
                raise
        return record, False

    async def _claimed(self, claim: str, run_id: str) -> tuple[str, RunRecord | None]:
        """The id that a claim stands for, and its run; no run if it is still to be created.

        A claim goes with its run. So one that stands before and after a look that found no run is of somebody who has
        not created it yet, and may never do.
        """
        before = None
        while True:
            stands_for = await self._runs.claim(claim, run_id, ttl_s=self._retention.idempotency_key)
            if stands_for in (run_id, before):
                return stands_for, None
            (found,) = await self._runs.load([stands_for])
            if found is not None:
                return stands_for, found
            before = stands_for

    # Execute

    async def execute(self, run_id: str) -> None:
        """Claim a run and run its task. Returns at once if the run is not QUEUED."""
        await self._engine.ensure_started()
        try:
            task = self.get((await self._runs.get(run_id)).task)
        except UnknownTask as exc:
            if not isinstance(self._engine.executor, InProcessExecutor):  # the queue does not have it any more
                await self._engine.end_waiting(run_id, RunError("UnknownTask", "the worker does not know the task"))
            raise exc
        try:
            record = await self._runs.update(run_id, Started(self._engine.owner))
        except InvalidTransition:
            return
        if record.is_completed:
            return
        execution = await self._engine.execution(record)
        try:
            await run_task(task, execution, threads=self._task_threads())
        finally:
            self._engine.ended(execution)

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


def _root(record: RunRecord, run_id: str) -> str:
    """The root of a run that takes another id: itself, if it was its own root."""
    return run_id if record.root_id in (record.id, None) else str(record.root_id)
