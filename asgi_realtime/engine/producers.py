"""The producers of this process: the shared writers of `append`, and the jobs of pipes.

A pipe writes into an existing run, or into a run that is created for it and ends with its source.
"""

from __future__ import annotations

from typing import Any, TypeVar
from weakref import WeakValueDictionary

import anyio

from asgi_realtime.brokers.base import StreamKey
from asgi_realtime.core.errors import BrokerUnavailable, RunExists, ServerShutdown, ThreadBusy
from asgi_realtime.core.runs import StoredRecord
from asgi_realtime.engine.engine import Engine
from asgi_realtime.engine.on_end import OnEnd
from asgi_realtime.engine.run import enter
from asgi_realtime.loop.logger import logger
from asgi_realtime.streams.outbox import Outbox
from asgi_realtime.streams.pipe import Pipe, Source
from asgi_realtime.streams.writer import Encode, StreamWriter

T = TypeVar("T")

_SHARED_WRITERS = 10_000


class Producers:
    """Creates writers and pipes, and runs the jobs of the pipes."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._shared: dict[tuple[str, str], StreamWriter] = {}  # by StreamKey, without inputs
        self._inputs: dict[tuple[str, str], StreamWriter] = {}
        self._outboxes: WeakValueDictionary[StreamKey, Outbox] = WeakValueDictionary()

    # Writers

    def writer(self, key: StreamKey) -> StreamWriter:
        """A new writer of a stream."""
        return StreamWriter(key, runs=self._engine.runs, find_outbox=self._outbox)

    def _outbox(self, key: StreamKey) -> Outbox:
        """The outbox that all writers of a stream share, for as long as one of them uses it."""
        outbox = self._outboxes.get(key)
        if outbox is None or outbox.failure is not None:
            engine = self._engine
            outbox = self._outboxes[key] = Outbox(key, runs=engine.runs, spawn=engine.spawn_brief)
        return outbox

    def known(self, run_id: str, stream: object) -> StreamWriter | None:
        """The shared writer of a user's stream, if `append` can use it without waiting. For the hot path."""
        writer = self._shared.get((run_id, stream)) if type(stream) is str else None
        return None if writer is None or writer.failure is not None or not self._engine.running else writer

    async def shared(self, key: StreamKey) -> StreamWriter:
        """The writer that all calls of `append` for a stream share, so that they keep their order. It is open."""
        await self._engine.ensure_started()
        writer = self.writer(key)
        await writer.open()
        shared = self._inputs if key.hidden else self._shared
        found = shared.get(key)
        if found is not None and found.failure is None:
            return found
        if len(shared) >= _SHARED_WRITERS:
            del shared[next(iter(shared))]
        shared[key] = writer
        return writer

    # Pipes

    def pipe_alone(
        self,
        source: Source[T],
        record: StoredRecord,
        stream: str,
        *,
        encode: Encode | None,
        owner: str | None,
        on_end: OnEnd | None,
        replaces: bool,
    ) -> Pipe[T]:
        """Forward a source into a new run, which starts and ends with it. `owner`: of the tokens of its handles.
        `replaces`: the run cancels the active run of its thread."""
        supervisor = self._engine.begin()
        self._engine.check_accepts_runs()
        pipe = self._pipe(source, StreamKey(record.id, stream), encode, owner)
        self._engine.runs.expect_creation(record.id)
        supervisor.spawn(lambda: self._run_around(record, pipe, owner, on_end, replaces))
        return pipe

    def pipe_into(self, source: Source[T], key: StreamKey, *, encode: Encode | None, owner: str | None) -> Pipe[T]:
        """Forward a source into a run that exists or is being created. `owner`: of the token of its handle."""
        supervisor = self._engine.begin()
        pipe = self._pipe(source, key, encode, owner)
        execution = self._engine.executions.get(key.run)
        if execution is not None:
            execution.run.pipes.add(pipe)
        supervisor.spawn(lambda: self._run_beside(pipe))
        return pipe

    def _pipe(self, source: Source[T], key: StreamKey, encode: Encode | None, owner: str | None) -> Pipe[T]:
        engine = self._engine
        return Pipe(
            source,
            self.writer(key),
            encode=encode,
            handle=lambda: engine.handle(key.run, owner),
            limits=engine.limits,
            timeouts=engine.timeouts,
            threads=engine.threads,
            post=engine.begin().post,
        )

    async def _run_around(
        self, record: StoredRecord, pipe: Pipe[Any], owner: str | None, on_end: OnEnd | None, replaces: bool
    ) -> None:
        engine = self._engine
        try:
            execution = await engine.open_run(record, handle_owner=owner, on_end=on_end, replaces=replaces)
        except (RunExists, ThreadBusy) as exc:
            await pipe.fail(exc)
            logger.warning("a pipe did not start: %s", exc)
            return
        except BaseException as exc:
            await pipe.fail(exc)
            raise
        finally:
            engine.runs.creation_settled(record.id)
            engine.wake_drain()
        execution.run.pipes.add(pipe)
        enter(execution.run)
        try:
            await pipe.run()
            await execution.finish_as_pipe(pipe)
        except (BrokerUnavailable, ServerShutdown) as exc:
            logger.error("the end of run %s could not be stored: %s", record.id, exc)
        except anyio.get_cancelled_exc_class():
            await execution.finish_stopped()
            raise
        finally:
            engine.executions.remove(execution)

    async def _run_beside(self, pipe: Pipe[Any]) -> None:
        try:
            await self._engine.ensure_started()
            await self._engine.runs.wait_created(pipe.run_id)
        except BaseException as exc:
            await pipe.fail(exc)
            raise
        execution = self._engine.executions.get(pipe.run_id)
        if execution is not None:
            execution.run.pipes.add(pipe)
        await pipe.run()
        if pipe.unseen_error is None and execution is not None:
            execution.run.pipes.discard(pipe)
        elif pipe.unseen_error is not None and execution is None:
            logger.warning("a pipe into run %s failed: %s", pipe.run_id, pipe.unseen_error)
