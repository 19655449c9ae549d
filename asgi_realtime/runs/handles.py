"""Handles, the results of `trigger` and `pipe`: the ids and tokens that a browser needs, as JSON.

A handle is a dict with the keys of the protocol, so a host can return it unchanged, also from a FastAPI route that is
annotated with its class. Its attributes have Python names. Its repr hides the token. It can be pickled; a handle from a
pickle has all but its `Realtime`, so it cannot wait for the result.
"""

from __future__ import annotations

import copy
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, ClassVar, Generic, Self, TypeVar

from asgi_realtime.core.config import Span, parse_span
from asgi_realtime.core.errors import UsageError, shown
from asgi_realtime.loop.waiting import at_most

R = TypeVar("R")

_Wait = Callable[..., Awaitable[Any]]
"""Waits for the result of a run, like `Realtime.result`."""

MakeHandle = Callable[[str, str | None], "RunHandle[Any]"]
"""Creates the handle of a run, with a new token of this owner; None if the token is its own owner."""

TOKEN_EXPIRES_IN = "1h"
"""The default lifetime of the token of a handle."""

TOKEN_EXPIRES_IN_S = parse_span(TOKEN_EXPIRES_IN)


def run_scopes(run_id: str) -> list[str]:
    """The scopes of the token of a run handle: reading the run, and sending inputs to it."""
    return [f"read:runs:{run_id}", f"write:inputStreams:{run_id}"]


def batch_scopes(batch_id: str) -> list[str]:
    """The scopes of the token of a batch handle: reading the batch and its runs."""
    return [f"read:batch:{batch_id}"]


async def _no_result(run_id: str, /, *, timeout: Span | None = None) -> Any:
    raise UsageError(f"the handle of run {run_id!r} comes from a pickle or from JSON; use realtime.result(handle)")


class _Handle(dict[str, Any]):
    """A dict that hides its token from logs."""

    __slots__ = ("_result",)
    _result: _Wait
    _json_types: ClassVar[dict[str, dict[str, Any]]] = {
        "id": {"type": "str"},
        "publicAccessToken": {"type": "str"},
        "isCached": {"type": "bool"},
    }
    """The keys and their types, as schemas of pydantic."""

    @classmethod
    def _of(cls, fields: Mapping[str, Any], result: _Wait = _no_result) -> Self:
        handle = cls.__new__(cls)
        handle.update(fields)
        handle._result = result
        return handle

    def __reduce__(self) -> tuple[Any, ...]:
        return self._of, (dict(self),)

    def __copy__(self) -> Self:
        return self._of(self, self._result)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self._of(copy.deepcopy(dict(self), memo), self._result)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> dict[str, Any]:
        """Makes the class an annotation for FastAPI. A schema of pydantic is a dict, so pydantic is not needed here."""

        def validate(value: Any, check: Callable[[Any], Any]) -> _Handle:
            return value if isinstance(value, cls) else cls._of(check(value))

        fields = {key: {"type": "typed-dict-field", "schema": schema} for key, schema in cls._json_types.items()}
        return {
            "type": "function-wrap",
            "function": {"type": "no-info", "function": validate},
            "schema": {"type": "typed-dict", "fields": fields, "config": {"title": cls.__name__}},
        }

    @property
    def id(self) -> str:
        """The id of the run or batch."""
        return str(self["id"])

    @property
    def public_access_token(self) -> str:
        """A token for this run or batch only."""
        return str(self["publicAccessToken"])

    @property
    def is_cached(self) -> bool:
        """Whether an earlier call created the run, with the same idempotency key."""
        return bool(self["isCached"])

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}>"

    __str__ = __repr__


class RunHandle(_Handle, Generic[R]):
    """A triggered run: `{"id", "publicAccessToken", "isCached"}`."""

    __slots__ = ()

    def __init__(self, run_id: str, token: str, *, is_cached: bool, result: _Wait) -> None:
        super().__init__(id=run_id, publicAccessToken=token, isCached=is_cached)
        self._result = result

    async def result(self, *, timeout: Span | None = None) -> R:
        """Wait until the run is over and return its output.

        Raises `RunFailed` or `RunCanceled` if it ended without one, `TimeoutError` after `timeout`, `RunNotFound`.
        Cancelling the caller does not cancel the run.
        """
        output: R = await self._result(self.id, timeout=timeout)
        return output


class BatchHandle(_Handle):
    """A triggered batch: `{"id", "publicAccessToken", "isCached", "runs", "runCount"}`.

    Its token reads the batch and all of its runs.
    """

    __slots__ = ()
    _json_types = _Handle._json_types | {
        "runs": {"type": "list", "items_schema": {"type": "str"}},
        "runCount": {"type": "int"},
    }

    def __init__(self, batch_id: str, token: str, *, runs: list[str], result: _Wait) -> None:
        super().__init__(id=batch_id, publicAccessToken=token, isCached=False, runs=runs, runCount=len(runs))
        self._result = result

    @property
    def runs(self) -> list[str]:
        """The ids of the runs, in the order of the items."""
        value: list[str] = self["runs"]
        return value

    async def results(self, *, timeout: Span | None = None) -> list[Any]:
        """Wait for all runs and return their outputs, in order. Raises as `RunHandle.result`; `timeout` is for all."""
        seconds = None if timeout is None else parse_span(timeout, name="timeout")
        outputs: dict[str, Any] = {}

        def describe() -> str:
            ended = f"{len(outputs)} of {len(set(self.runs))} runs of batch {shown(self.id)} have ended"
            return f"{ended} within {seconds:g} s; the others continue"

        with at_most(seconds, describe):
            for run_id in self.runs:
                outputs[run_id] = await self._result(run_id)
        return [outputs[run_id] for run_id in self.runs]
