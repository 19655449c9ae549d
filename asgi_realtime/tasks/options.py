"""What callers choose for a run, and the values that name a run.

The options are written down once, here: `Realtime.trigger`, its blocking form, batch items, and requests of the
official clients all use these types. `RecordFactory` checks the values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, Literal, TypedDict

from asgi_realtime.core.config import Span, parse_span
from asgi_realtime.core.errors import UsageError, shown
from asgi_realtime.core.run_record import RunRecord
from asgi_realtime.engine.on_end import OnEnd
from asgi_realtime.engine.run import Run
from asgi_realtime.runs.handles import RunHandle

RunLike = str | RunHandle[Any] | Run | RunRecord
"""A run, wherever an argument names one: its id, its handle, the `Run` itself, or a record of it."""


OnConflict = Literal["reject", "replace"]
"""What a new run does if another one is active in its thread: raise `ThreadBusy`, or cancel it and start."""


class ThreadOptions(TypedDict, total=False):
    """The thread of a run."""

    thread: str | None
    on_conflict: OnConflict


OnUnwatched = Literal["continue", "cancel"]
"""What happens to a run that has had readers and has none anymore. Both count the readers, for `Run.watchers`."""

DEFAULT_GRACE = "15s"
"""How long a run has no reader before it is canceled. Enough to reload a page."""


class UnwatchedOptions(TypedDict, total=False):
    """What happens to a run when nobody reads it."""

    on_unwatched: OnUnwatched | None
    unwatched_grace: Span | None


class RunOptions(ThreadOptions, UnwatchedOptions, total=False):
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

    run_id: str | None
    parent: RunLike | None
    token_expires_in: Span
    owner: str | None


class OpenRunOptions(ThreadOptions, UnwatchedOptions, total=False):
    """The keyword arguments of `Realtime.open_run`."""

    tags: str | Iterable[str] | None
    metadata: Mapping[str, Any] | None
    run_id: str | None
    owner: str | None
    on_end: OnEnd | None


class PipeRunOptions(OpenRunOptions, total=False):
    """The keyword arguments of `Realtime.pipe` for the run that a pipe opens outside of one, and for its handle."""

    task: str


class PipeOptions(PipeRunOptions, total=False):
    """The keyword arguments of `Realtime.pipe`."""

    encode: Callable[[Any], Any] | None


def check_names(options: Mapping[str, Any], allowed: type) -> None:
    """Raises `UsageError` for an option that is not in this TypedDict."""
    names: frozenset[str] = allowed.__optional_keys__  # type: ignore[attr-defined]
    if unknown := options.keys() - names:
        raise UsageError(f"unknown option {', '.join(sorted(map(str, unknown)))}; allowed: {', '.join(sorted(names))}")


def check_writes_into_a_run(options: PipeRunOptions) -> None:
    """Raises `UsageError` for an option that only applies to a run that the pipe creates."""
    if options.get("tags") is not None or options.get("metadata") is not None:
        raise UsageError("tags= and metadata= are for a run that pipe() creates; use run.tags and run.metadata")
    if options.get("run_id") is not None:
        raise UsageError("run_id= is for a run that pipe() creates; use run= to write into a run that exists")
    if options.get("thread") is not None:
        raise UsageError("thread= is for a run that pipe() creates; pass it where this run is created")
    for name in ("on_end", "on_unwatched", "unwatched_grace"):
        if options.get(name) is not None:
            raise UsageError(f"{name}= is for a run that pipe() creates; pass it to the task or to open_run()")


def unwatched_fields(options: UnwatchedOptions) -> dict[str, Any]:
    """The fields of a record that follow from these options. Empty without `on_unwatched`. Raises `UsageError`."""
    on_unwatched, grace = options.get("on_unwatched"), options.get("unwatched_grace")
    if on_unwatched not in (None, "continue", "cancel"):
        raise UsageError(f"on_unwatched is {shown(on_unwatched)}; allowed are 'continue' and 'cancel'")
    if on_unwatched == "cancel":
        seconds = parse_span(DEFAULT_GRACE if grace is None else grace, name="unwatched_grace")
        return {"counts_watchers": True, "unwatched_grace_s": seconds}
    if grace is not None:
        raise UsageError("unwatched_grace= is for a run that is canceled; pass on_unwatched='cancel' too")
    return {} if on_unwatched is None else {"counts_watchers": True}


def run_id_of(run: RunLike) -> str:
    """The id of a run. Raises `UsageError` for anything that does not name one."""
    run_id = run if isinstance(run, str) else getattr(run, "id", None)
    if not isinstance(run_id, str) or not run_id:
        raise UsageError(f"a run is a {type(run).__name__}; pass its id, a RunHandle, a Run or a RunRecord")
    return run_id
