"""The calls that register tasks, create runs, execute them, and wait for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from typing import Any, ParamSpec, TypeVar, Unpack, cast, overload

from asgi_realtime.calls.parts import Parts
from asgi_realtime.core.config import Span, parse_span
from asgi_realtime.core.errors import InvalidConfiguration, shown
from asgi_realtime.core.names import check_thread
from asgi_realtime.core.run_errors import end_error
from asgi_realtime.core.run_record import RunRecord
from asgi_realtime.engine.on_end import OnEnd, check_on_end
from asgi_realtime.engine.open_run import OpenRun
from asgi_realtime.engine.run import Run
from asgi_realtime.loop.waiting import at_most
from asgi_realtime.runs.handles import (
    TOKEN_EXPIRES_IN,
    TOKEN_EXPIRES_IN_S,
    BatchHandle,
    RunHandle,
    batch_scopes,
    run_scopes,
)
from asgi_realtime.tasks.batches import BatchItem
from asgi_realtime.tasks.options import OnUnwatched, OpenRunOptions, RunLike, TriggerOptions, check_names, run_id_of
from asgi_realtime.tasks.task import Task, TaskDecorator
from asgi_realtime.tokens import check_owner

P = ParamSpec("P")
R = TypeVar("R")


class RunCalls(Parts):
    """Tasks and their runs."""

    def task(
        self,
        id: str,
        *,
        max_duration: Span | None = None,
        concurrency_limit: int | None = None,
        on_end: OnEnd | None = None,
        on_unwatched: OnUnwatched | None = None,
        unwatched_grace: Span | None = None,
    ) -> TaskDecorator:
        """Register an `async def` function as a task, or a `def` function, which runs in a thread.

        The function takes `()`, `(payload)`, `(payload, run)` or `(run: Run)`. The payload is decoded into its
        annotation: a dataclass, msgspec struct, pydantic model, TypedDict or plain JSON. The return value is the run's
        output. The decorator returns a `Task`, which can still be called as the plain function. Raises
        `InvalidConfiguration`, also for an id that is taken; in a notebook the new task replaces the old one.

        `on_end` is called with a `RunEnd` when a run of the task is over, however it ended: at least once, in a process
        that has the task. An exception in it is logged. A `def` function runs in a thread and gets a `SyncRunEnd`.

        `on_unwatched="cancel"` cancels a run of the task once it has had a reader, and then none for `unwatched_grace`
        (default: 15 s), in any process. "continue" only counts the readers, for `run.watchers()`.
        """
        if callable(id):
            raise InvalidConfiguration(f'a task needs an id: @realtime.task("{getattr(id, "__name__", "report")}")')

        def register(function: Callable[..., Any], /) -> Task[..., Any]:
            return self.tasks.register(
                id,
                function,
                max_duration=max_duration,
                concurrency_limit=concurrency_limit,
                on_end=on_end,
                on_unwatched=on_unwatched,
                unwatched_grace=unwatched_grace,
            )

        return cast(TaskDecorator, register)

    @overload
    async def trigger(
        self, task: Task[P, R], payload: Any = None, **options: Unpack[TriggerOptions]
    ) -> RunHandle[R]: ...

    @overload
    async def trigger(self, task: str, payload: Any = None, **options: Unpack[TriggerOptions]) -> RunHandle[Any]: ...

    async def trigger(
        self, task: Task[P, R] | str, payload: Any = None, **options: Unpack[TriggerOptions]
    ) -> RunHandle[R] | RunHandle[Any]:
        """Create a run of a task and return its handle, which can be sent to a browser as JSON.

        * `tags`, `metadata`: what the run has from its creation on.
        * `idempotency_key`: the same key returns the same run, for `idempotency_key_ttl` (default: a day) and as long
          as the run is retained.
        * `run_id`: the id of the run, such as that of a row in your database; by default a random one. Not together
          with `idempotency_key`. Raises `RunExists` for the id of another run.
        * `ttl`: the run is EXPIRED if it has not started by then.
        * `delay`: when the run starts: after a span, or at a `datetime` with a time zone.
        * `max_duration`: shortens the `max_duration` of the task.
        * `thread`: the name of what has at most one active run, such as `"chat:1"`, across all tasks and processes. If
          a run of the thread is active, `on_conflict="reject"` (the default) raises `ThreadBusy`, which names it, and
          `"replace"` cancels it and creates the new run at once.
        * `on_unwatched`, `unwatched_grace`: replace those of the task.
        * `parent`: the run that triggers this one; by default the current run.
        * `token_expires_in`: how long the handle's token is valid (default: an hour).
        * `owner`: the owner of the handle's token, as in `create_public_token`; by default that of the current run. The
          run itself is not charged to it.

        If the executor does not accept the run now, it stays QUEUED until the executor does. Raises `UnknownTask`,
        `InvalidPayload`, `LimitExceeded` and `UsageError` before anything is stored, `ThreadBusy`, and
        `BrokerUnavailable`.
        """
        expires_in_s = self._life_s(options.pop("token_expires_in", TOKEN_EXPIRES_IN), name="token_expires_in")
        owner = self._handle_owner(options.pop("owner", None))
        parent = options.pop("parent", None)
        parent_id = None if parent is None else run_id_of(parent)
        run_id = options.pop("run_id", None)
        launched = await self.tasks.trigger(task, payload, options, parent_id=parent_id, run_id=run_id)
        return self._handle(launched.record.id, owner, is_cached=launched.is_cached, expires_in_s=expires_in_s)

    async def batch_trigger(
        self, items: Iterable[BatchItem], *, token_expires_in: Span = TOKEN_EXPIRES_IN, owner: str | None = None
    ) -> BatchHandle:
        """Create several runs: `(task, payload)` or `(task, payload, options)` each. Options are a dict of `tags`,
        `metadata`, `idempotency_key`, `idempotency_key_ttl`, `ttl`, `delay`, `max_duration`, as in `trigger`, and so
        are `token_expires_in` and `owner`, for the token of the handle.

        If the idempotency key of an item names an earlier run, the handle lists that run, but it does not become part
        of the batch. All items are checked before the first run is created. Raises what `trigger` raises, and
        `LimitExceeded` for too many items.
        """
        expires_in_s = self._life_s(token_expires_in, name="token_expires_in")
        owner = self._handle_owner(owner)
        batch = await self.tasks.batch_trigger(items)
        scopes = [*batch_scopes(batch.id), *(f"read:runs:{run_id}" for run_id in batch.earlier_run_ids)]
        token = self.tokens.mint(scopes, expires_in_s=expires_in_s, own_id=True, owner=owner)
        return BatchHandle(batch.id, token, runs=batch.run_ids, result=self.result)

    async def execute(self, run_id: str) -> None:
        """Execute a triggered run in this process and wait until it is over. The worker of a job queue calls this.

        A run executes at most once: if it is no longer QUEUED, this returns. Raises `RunNotFound`, `UnknownTask`.
        Cancelling the caller cancels the run.
        """
        await self.tasks.execute(run_id)

    def open_run(self, name: str, **options: Unpack[OpenRunOptions]) -> AbstractAsyncContextManager[Run]:
        """A run around the host's own code, as an `async with`.

        Options are `tags`, `metadata`, `run_id`, `thread`, `on_conflict`, as in `trigger`, `on_unwatched` and
        `unwatched_grace`, as in `task`, and `owner`, for the token in `run.handle`. `on_end` is called when the run is
        over, as in `task`, by this process only: it is lost if the process dies. Entering raises `RunExists` and
        `ThreadBusy`.

        Leaving it completes the run with what `run.set_output` received. An exception fails the run and propagates; a
        cancellation by the host cancels it and propagates; `cancel(run)` cancels the body, and the `async with` raises
        `RunCanceled`. On asyncio it can be left in another task than it was entered in.
        """
        check_names(options, OpenRunOptions)
        record, _, replaces = self.tasks.records.new_open_run(name, options)
        owner, on_end = self._handle_owner(options.get("owner")), check_on_end(options.get("on_end"))
        return OpenRun(
            lambda: self.engine.open_run(record, handle_owner=owner, on_end=on_end, replaces=replaces),
            self.engine.executions.remove,
        )

    async def cancel(self, run: RunLike) -> RunRecord:
        """Cancel a run, from any process. A waiting run is CANCELED at once; an executing one is asked to stop.

        Its pipes still write the chunks they hold. A run that is over does not change. Raises `RunNotFound`.
        """
        await self.ensure_started()
        return RunRecord(await self.engine.executions.cancel(run_id_of(run)))

    async def active_run(
        self, thread: str, *, owner: str | None = None, token_owner: str | None = None
    ) -> RunHandle[Any] | None:
        """The run of a thread that has not ended, or None: when a reader sees the end of a run, it is None already.

        `owner` is the owner of the handle's token, as in `trigger`. The threads of browsers that trigger runs with
        public tokens are apart from yours: `token_owner` looks among those of this owner.
        """
        await self.ensure_started()
        record = await self.engine.run_threads.active(check_thread(thread, self.limits), check_owner(token_owner))
        return None if record is None else self._handle(record.id, self._handle_owner(owner or token_owner))

    async def get_run(self, run: RunLike) -> RunRecord:
        """The newest record of a run. Raises `RunNotFound`."""
        await self.ensure_started()
        return RunRecord(await self.runs.get(run_id_of(run)))

    @overload
    async def result(self, run: RunHandle[R], *, timeout: Span | None = None) -> R: ...

    @overload
    async def result(self, run: RunLike, *, timeout: Span | None = None) -> Any: ...

    async def result(self, run: RunLike, *, timeout: Span | None = None) -> Any:
        """Wait until a run is over and return its output.

        Raises `RunFailed`, `RunCanceled`, `RunNotFound`, and `TimeoutError` after `timeout`.
        """
        await self.ensure_started()
        run_id = run_id_of(run)
        seconds = None if timeout is None else parse_span(timeout, name="timeout")
        with at_most(seconds, lambda: f"run {shown(run_id)} has not ended within {seconds:g} s; it continues"):
            record = await self.runs.ended(run_id)
        if not record.is_success:
            assert record.end is not None
            raise end_error(record.end, RunRecord(record))
        return self.tasks.decode_output(record)

    def _handle(
        self,
        run_id: str,
        owner: str | None,
        *,
        is_cached: bool = False,
        expires_in_s: float = TOKEN_EXPIRES_IN_S,
    ) -> RunHandle[Any]:
        token = self.tokens.mint(run_scopes(run_id), expires_in_s=expires_in_s, own_id=True, owner=owner)
        return RunHandle(run_id, token, is_cached=is_cached, result=self.result)
