"""The producers of this process: the shared writers of `append`, and the jobs of pipes.

A pipe writes into an existing run, or into a run that is created for it and ends with its source.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import anyio

from asgi_realtime.brokers.base import StreamKey
from asgi_realtime.core.errors import BrokerUnavailable, ServerShutdown
from asgi_realtime.core.log import HIDDEN_STREAM
from asgi_realtime.core.runs import RunRecord
from asgi_realtime.engine.engine import Engine
from asgi_realtime.engine.run import current
from asgi_realtime.runs.handles import RunHandle
from asgi_realtime.streams.pipe import Pipe, Source
from asgi_realtime.streams.writer import Encode, StreamWriter

logger = logging.getLogger("asgi_realtime")

T = TypeVar("T")

_SHARED_WRITERS = 10_000


class Producers:
    """Creates writers and pipes, and runs the jobs of the pipes. `handle` creates the handle of a run."""

    def __init__(self, engine: Engine, *, handle: Callable[[str], RunHandle[Any]]) -> None:
        self._engine = engine
        self._handle = handle
        self._shared: dict[tuple[str, str], StreamWriter] = {}  # by StreamKey

    # Writers

    def writer(self, key: StreamKey) -> StreamWriter:
        """A new writer: one more producer of the stream."""
        engine = self._engine
        return StreamWriter(key, runs=engine.runs, spawn=engine.spawn_brief)

    def known(self, run_id: str, stream: object) -> StreamWriter | None:
        """The shared writer of a user's stream, if `append` can use it without waiting. For the hot path."""
        if not isinstance(stream, str) or stream.startswith(HIDDEN_STREAM) or not self._engine.running:
            return None
        writer = self._shared.get((run_id, stream))
        return None if writer is None or writer.failure is not None else writer

    async def shared(self, key: StreamKey) -> StreamWriter:
        """The writer that all calls of `append` for a stream share, so that they keep their order. It is open."""
        await self._engine.ensure_started()
        writer = self.writer(key)
        await writer.open()
        found = self._shared.get(key)
        if found is not None and found.failure is None:
            return found
        if len(self._shared) >= _SHARED_WRITERS:
            del self._shared[next(iter(self._shared))]
        self._shared[key] = writer
        return writer

    # Pipes

    def pipe_alone(self, source: Source[T], record: RunRecord, stream: str, *, encode: Encode | None) -> Pipe[T]:
        """Forward a source into a new run, which starts and ends with it."""
        supervisor = self._engine.begin()
        pipe = self._pipe(source, StreamKey(record.id, stream), encode)
        self._engine.runs.expect_creation(record.id)
        supervisor.spawn(lambda: self._run_around(record, pipe))
        return pipe

    def pipe_into(self, source: Source[T], key: StreamKey, *, encode: Encode | None) -> Pipe[T]:
        """Forward a source into a run that exists or is being created."""
        supervisor = self._engine.begin()
        pipe = self._pipe(source, key, encode)
        execution = self._engine.executions.get(key.run)
        if execution is not None:
            execution.run.pipes.add(pipe)
        supervisor.spawn(lambda: self._run_beside(pipe))
        return pipe

    def _pipe(self, source: Source[T], key: StreamKey, encode: Encode | None) -> Pipe[T]:
        engine = self._engine
        return Pipe(
            source,
            self.writer(key),
            encode=encode,
            handle=lambda: self._handle(key.run),
            limits=engine.limits,
            timeouts=engine.timeouts,
            threads=engine.threads,
            post=engine.begin().post,
        )

    async def _run_around(self, record: RunRecord, pipe: Pipe[Any]) -> None:
        engine = self._engine
        try:
            execution = await engine.open_run(record)
        except BaseException as exc:
            await pipe.fail(exc)
            raise
        finally:
            engine.runs.creation_settled(record.id)
        execution.run.pipes.add(pipe)
        current.set(execution.run)
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
