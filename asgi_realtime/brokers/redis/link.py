"""One connection to one server, shared by all who have something to say.

The commands of one turn of the loop go out in one piece and the answers come back in their order, so a thousand writers
cost one write. Cancelling a caller leaves its command on its way. A connection that is lost, or silent for
too long, fails everything that is under way; the next command makes a new one.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Protocol

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from asgi_realtime.core.errors import BrokerUnavailable, ServerShutdown

try:
    from hiredis import pack_command
except ImportError:  # the extra brings it, but redis-py alone works too
    pack_command = None  # type: ignore[assignment]

Connect = Callable[[], AbstractConnection]
Command = tuple[Any, ...]

_COOL_DOWN_S = 0.1
"""After a connection that could not be made or gave no answer, before the next is tried."""


class Lost(BrokerUnavailable):
    """The connection is gone, or could not be made. Nothing is known of what was under way."""

    def __init__(self, message: str, *, broke: bool = False) -> None:
        super().__init__(message)
        self.broke = broke
        """It worked until then, so a new one may work at once."""


class Reporter(Protocol):
    """Who is told whether the server is there."""

    def broke(self, reason: Exception) -> None: ...

    def lost(self, reason: Exception) -> None: ...

    def works(self) -> None: ...


async def until_one_ends(*parts: Coroutine[Any, Any, None]) -> None:
    """Run the parts of a connection side by side. The first that ends ends the others, and its error is raised."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Link:
    """Sends commands and gives their answers. `connect` makes a connection that is not open yet."""

    def __init__(
        self,
        connect: Connect,
        *,
        timeout_s: float,
        spawn: Callable[[Coroutine[Any, Any, None]], Any],
        reporter: Reporter,
    ) -> None:
        self._connect = connect
        self._timeout_s = timeout_s
        self._spawn = spawn
        self._reporter = reporter
        self._queue: list[tuple[Command, asyncio.Future[Any]]] = []
        self._sent: deque[asyncio.Future[Any]] = deque()
        self._heard_at = 0.0  # when the server last gave an answer, or had nothing to answer
        self._wanted = asyncio.Event()
        self._given_up = asyncio.Event()
        self._answered = False
        self._task: Any = None
        self._closed = False
        self.failing = False
        """The last try came to nothing."""

    def send(self, *command: Any) -> asyncio.Future[Any]:
        """Send a command; the future has its answer, or raises `Lost`, or the server's `ResponseError`."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self._closed:
            future.set_exception(ServerShutdown())
            return future
        self._queue.append((command, future))
        self._wanted.set()
        if self._task is None or self._task.done():
            self._task = self._spawn(self._run())
        return future

    def reset(self) -> None:
        """Give up the connection: it leads to the wrong server."""
        self._given_up.set()

    async def aclose(self) -> None:
        """Fail what is under way and close the connection."""
        self._closed = True
        self._fail(ServerShutdown())
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        """Connect when there is something to say, and carry commands until the connection is lost."""
        while True:
            await self._wanted.wait()
            self._answered = False
            connection = self._connect()
            try:
                try:
                    async with asyncio.timeout(self._timeout_s):
                        await connection.connect()  # type: ignore[no-untyped-call]
                except Exception as exc:
                    self._fail(Lost(f"Redis cannot be reached: {exc or type(exc).__name__}"))
                    self._wanted.clear()
                    raise
                await self._carry(connection)
            except Exception as exc:  # whatever it is, such as an answer that cannot be parsed: nobody waits for ever
                self._lost(exc)
            finally:
                await connection.disconnect(nowait=True)
            if not self._answered:
                await asyncio.sleep(_COOL_DOWN_S)

    def _lost(self, exc: Exception) -> None:
        """The connection is gone, or did not come about. A server may close one that nobody needs just now."""
        broke = self._answered and not isinstance(exc, TimeoutError | RedisTimeoutError)
        if not broke:
            self.failing = True
            self._reporter.lost(exc)
        elif self._sent or self._queue:
            self._reporter.broke(exc)
        self._fail(Lost(f"the connection to Redis was lost: {exc or type(exc).__name__}", broke=broke), unsent=False)

    async def _carry(self, connection: AbstractConnection) -> None:
        self._heard_at = asyncio.get_running_loop().time()
        await until_one_ends(self._write(connection), self._read(connection), self._watch())

    async def _write(self, connection: AbstractConnection) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            queue, self._queue = self._queue, []
            batch = [(command, future) for command, future in queue if not future.done()]
            if not batch:
                continue
            if not self._sent:
                self._heard_at = loop.time()
            self._sent.extend(future for _, future in batch)
            packed = _pack(connection, [command for command, _ in batch])
            await connection.send_packed_command(packed, check_health=False)

    async def _read(self, connection: AbstractConnection) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                answer = await connection.read_response(disable_decoding=True, disconnect_on_error=False)
            except ResponseError as exc:
                answer = exc
            self._heard_at = loop.time()
            if not self._answered:
                self._answered = True
                self.failing = False
                self._reporter.works()
            future = self._sent.popleft()
            if future.done():
                continue
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)

    async def _watch(self) -> None:
        """End when the server owes an answer for too long, or somebody has given it up."""
        loop = asyncio.get_running_loop()
        self._given_up.clear()
        looked_at = loop.time()
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._given_up.wait(), self._timeout_s / 4)
                raise ConnectionError("it led to the wrong server")
            if self._answered and self._heard_at > looked_at:
                self._reporter.works()  # if another connection has said that it does not
            looked_at = loop.time()
            if self._sent and loop.time() - self._heard_at > self._timeout_s:
                raise TimeoutError(f"no answer for {self._timeout_s:g} s")

    def _fail(self, failure: Lost | ServerShutdown, *, unsent: bool = True) -> None:
        under_way = list(self._sent)
        self._sent.clear()
        if unsent:
            queue, self._queue = self._queue, []
            under_way += [future for _, future in queue]
        for future in under_way:
            if not future.done():
                again = (
                    Lost(str(failure), broke=failure.broke)
                    if isinstance(failure, Lost)
                    else ServerShutdown(str(failure))
                )
                future.set_exception(again)  # one each: a traceback grows by raising
                future.exception()  # whoever asked may be gone: that is nothing to warn of


def _pack(connection: AbstractConnection, commands: list[Command]) -> bytes | list[bytes]:
    """The commands as they are sent. redis-py's own way, in Python, takes six times as long."""
    if pack_command is None:
        return connection.pack_commands(commands)
    return b"".join([pack_command(command) for command in commands])
