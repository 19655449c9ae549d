"""What the calls of every subject use.

The calls of a subject are a class that inherits from `Parts`, and `Realtime` inherits all of these classes. A call of
one subject uses no call of another.
"""

from __future__ import annotations

from asgi_realtime.core.config import Span, parse_span
from asgi_realtime.engine.engine import Engine
from asgi_realtime.engine.producers import Producers
from asgi_realtime.engine.run import current_run_of
from asgi_realtime.streams.readers import ReaderShutdown
from asgi_realtime.tasks.registry import Tasks
from asgi_realtime.tokens import TokenAuthority, check_owner


class Parts:
    """The parts of a `Realtime`, and what several of its calls need to know."""

    def __init__(self, engine: Engine, tasks: Tasks, tokens: TokenAuthority) -> None:
        self.engine = engine
        self.tasks = tasks
        self.tokens = tokens
        self.runs = engine.runs
        self.limits = engine.limits
        self._producers = Producers(engine)

    async def ensure_started(self) -> None:
        """Start unless this runs already, outside of the context of the caller."""
        await self.engine.ensure_started()

    def _life_s(self, expires_in: Span, *, name: str) -> float:
        """The lifetime of a token, in seconds. Raises `LimitExceeded`."""
        return self.tokens.check_life(parse_span(expires_in, name=name), name=name)

    def _handle_owner(self, owner: str | None) -> str | None:
        """The owner of the token of a handle that the calling code creates."""
        run = current_run_of(self.runs) if owner is None else None
        return check_owner(owner) if run is None else run.handle_owner

    def _reader_shutdown(self) -> ReaderShutdown | None:
        """What ends a reader that the calling code creates. Inside of a run nothing does: the run drains."""
        return None if current_run_of(self.runs) is not None else self.engine.shutdown
