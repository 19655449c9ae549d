"""`parts()`: turns the stream of a model or an agent into message parts.

The source is opened, and each of its items goes to the converter that recognizes it (`sources/`). Converters emit parts
through one `Emitter`, which is responsible for their order. A source can mix items: part dicts of the host among the
chunks of a model, for example.

The states of `Parts`: it is new; the first `__aenter__` or `__anext__` opens the source; the end of the source, its
error, or `aclose` closes it. If the source raises, the open blocks of text are ended before the error is raised again.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import anyio.from_thread
import anyio.lowlevel

from asgi_realtime.ai.emitter import Emitter
from asgi_realtime.ai.message_parts import Part
from asgi_realtime.ai.sources import Converter, check, converter_for, unwrapped
from asgi_realtime.core.config import Timeouts
from asgi_realtime.core.errors import UsageError, shown
from asgi_realtime.streams.sources import close_source, discard, open_iterator
from asgi_realtime.streams.thread_iterator import ThreadBudget

_CLOSE_S = Timeouts().close


def parts(source: Any, *, message_id: str | None = None) -> Parts:
    """Message parts of the stream of a model or an agent, for `realtime.pipe`.

    The parts are dicts of the AI SDK's UI message stream. With `message_id` the first one is `start` with that id. If
    the source ends normally, the last one is `finish`. If it raises, open text ends and the error is raised.

    Iterate the result, or pipe it. Use `async with` if you may leave the loop early: it closes the source.

    Raises `InvalidSource` if the source is not a supported one, here or with its first item, and `SourceFailed` if the
    model reports a failure within its stream.
    """
    if message_id is not None and (not isinstance(message_id, str) or not message_id):
        raise UsageError(f"message_id is {shown(message_id)}; allowed is text that is not empty")
    check(source)
    return Parts(source, message_id)


class Parts(AsyncIterator[Part]):
    """The parts of one source. Created by `parts()`."""

    must_be_entered = True
    """A pipe enters it instead of iterating it only, because its source can be a context manager."""

    def __init__(self, source: Any, message_id: str | None) -> None:
        self._source = source
        self._emitter = Emitter()
        if message_id is not None:
            self._emitter.start(message_id)
        self._resources = AsyncExitStack()
        self._items: AsyncIterator[Any] | None = None
        self._converters: dict[type[Converter], Converter] = {}
        self._last: Converter | None = None
        """The converter of the last dict or tuple."""
        self._convert_by_class: dict[type, Callable[[Any], None]] = {}
        self._error: Exception | None = None
        self._ended = False
        self._is_entered = False

    def __repr__(self) -> str:
        return f"<Parts of a {type(self._source).__name__}>"

    async def __aenter__(self) -> AsyncIterator[Part]:
        self._is_entered = True
        await self._open()
        return _Entered(self)

    async def __aexit__(self, *exc_info: Any) -> None:
        if self._items is None and not self._ended:
            self._resources.push_async_callback(discard, unwrapped(self._source), close_s=_CLOSE_S)
        self._ended = True
        await self._resources.__aexit__(*exc_info)

    async def aclose(self) -> None:
        """Close the source. Idempotent."""
        await self.__aexit__(None, None, None)

    def __aiter__(self) -> AsyncIterator[Part]:
        return self

    async def __anext__(self) -> Part:
        ready = self._emitter.parts
        while not ready:
            if self._ended:
                error, self._error = self._error, None
                raise error or StopAsyncIteration
            await self._step()
        return ready.popleft()

    # The source

    async def _open(self) -> None:
        if self._items is not None or self._ended:
            return
        source = unwrapped(self._source)
        try:
            while hasattr(source, "__aenter__") and not hasattr(source, "__aiter__"):
                source = unwrapped(await self._resources.enter_async_context(source))
            self._items, resources = open_iterator(
                source,
                threads=ThreadBudget(1),
                post=partial(anyio.from_thread.run_sync, token=anyio.lowlevel.current_token()),
            )
            self._resources.push_async_callback(_close, resources)
        except BaseException:
            self._ended = True
            await self._resources.aclose()
            raise

    async def _step(self) -> None:
        """Read one item and emit its parts, or those of the end."""
        try:
            await self._open()
            assert self._items is not None
            self._convert(await self._items.__anext__())
        except StopAsyncIteration:
            await self._end(None)
        except Exception as exc:
            await self._end(exc)
        except BaseException:
            if not self._is_entered:
                await self.aclose()
            raise

    async def _end(self, error: Exception | None) -> None:
        """Close the source, and emit `finish` unless something failed."""
        try:
            await self.__aexit__(type(error) if error else None, error, error.__traceback__ if error else None)
            if error is None:
                for converter in self._converters.values():
                    converter.finish()
        except Exception as exc:
            error = error or exc
        if error is None:
            self._emitter.finish()
        else:
            self._emitter.end_all()
            self._error = error

    def _convert(self, item: Any) -> None:
        cls = type(item)
        if cls is dict or cls is tuple:  # their content says what they are
            if self._last is None or not self._last.accepts(item):
                self._last = self._converter_of(item)
            self._last.convert(item)
            return
        convert = self._convert_by_class.get(cls)
        if convert is None:
            convert = self._convert_by_class[cls] = self._converter_of(item).convert
        convert(item)

    def _converter_of(self, item: Any) -> Converter:
        kind = converter_for(item)
        if kind not in self._converters:
            self._converters[kind] = kind(self._emitter)
        return self._converters[kind]


class _Entered(AsyncIterator[Part]):
    """What `async with parts(x)` returns: an iterator only, so that a pipe does not enter it again."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    async def __anext__(self) -> Part:
        return await self._parts.__anext__()


async def _close(resources: list[Any]) -> None:
    for resource in resources:
        await close_source(resource, close_s=_CLOSE_S)
