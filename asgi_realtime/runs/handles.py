"""Handles, the results of `trigger` and `pipe`: the ids and tokens that a browser needs, as JSON.

A handle is a dict with the keys of the protocol, so a host can return it unchanged. Its attributes have Python names.
Its repr hides the token.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

from asgi_realtime.core.config import Span

R = TypeVar("R")

TOKEN_EXPIRES_IN = "1h"
"""The default lifetime of the token of a handle."""


def run_scopes(run_id: str) -> list[str]:
    """The scopes of the token of a run handle: reading the run, and sending inputs to it."""
    return [f"read:runs:{run_id}", f"write:inputStreams:{run_id}"]


def batch_scopes(batch_id: str) -> list[str]:
    """The scopes of the token of a batch handle: reading the batch and its runs."""
    return [f"read:batch:{batch_id}"]


class _Handle(dict[str, Any]):
    """A dict that hides its token from logs."""

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

    __slots__ = ("_result",)

    def __init__(self, run_id: str, token: str, *, is_cached: bool, result: Callable[..., Awaitable[Any]]) -> None:
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

    __slots__ = ("_result",)

    def __init__(self, batch_id: str, token: str, *, runs: list[str], result: Callable[..., Awaitable[Any]]) -> None:
        super().__init__(id=batch_id, publicAccessToken=token, isCached=False, runs=runs, runCount=len(runs))
        self._result = result

    @property
    def runs(self) -> list[str]:
        """The ids of the runs, in the order of the items."""
        value: list[str] = self["runs"]
        return value

    async def results(self, *, timeout: Span | None = None) -> list[Any]:
        """Wait for all runs and return their outputs, in order. Raises as `RunHandle.result`."""
        return [await self._result(run_id, timeout=timeout) for run_id in self.runs]
