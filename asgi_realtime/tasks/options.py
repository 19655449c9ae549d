"""What callers choose for a run, and the values that name a run.

The options are written down once, here: `Realtime.trigger`, its blocking form, batch items, and requests of the
official clients all use these types. `RecordFactory` checks the values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, TypedDict

from asgi_realtime.core.config import Span
from asgi_realtime.core.errors import UsageError
from asgi_realtime.core.runs import RunRecord
from asgi_realtime.engine.run import Run
from asgi_realtime.runs.handles import RunHandle

RunLike = str | RunHandle[Any] | Run | RunRecord
"""A run, wherever an argument names one: its id, its handle, the `Run` itself, or a record of it."""


class RunOptions(TypedDict, total=False):
    """The options of a triggered run. None means the same as leaving the option out."""

    tags: str | Iterable[str] | None
    metadata: Mapping[str, Any] | None
    idempotency_key: str | None
    idempotency_key_ttl: Span | None
    ttl: Span | None
    delay: Span | datetime | None
    max_duration: Span | None


class TriggerOptions(RunOptions, total=False):
    """The keyword arguments of `Realtime.trigger`."""

    parent: RunLike | None
    token_expires_in: Span


class PipeRunOptions(TypedDict, total=False):
    """The keyword arguments of `Realtime.pipe` for the run that a pipe opens outside of one."""

    task: str
    tags: str | Iterable[str] | None
    metadata: Mapping[str, Any] | None


class PipeOptions(PipeRunOptions, total=False):
    """The keyword arguments of `Realtime.pipe`."""

    encode: Callable[[Any], Any] | None


def run_id_of(run: RunLike) -> str:
    """The id of a run. Raises `UsageError` for anything that does not name one."""
    run_id = run if isinstance(run, str) else getattr(run, "id", None)
    if not isinstance(run_id, str) or not run_id:
        raise UsageError(f"a run is a {type(run).__name__}; pass its id, a RunHandle, a Run or a RunRecord")
    return run_id
