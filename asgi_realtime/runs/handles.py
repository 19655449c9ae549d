"""What `trigger` and `pipe` give back: the ids and tokens that a browser needs, as ready JSON.

A handle is a dict with the keys of the wire, so every host can return it as it is; in Python its attributes have Python
names. Its repr hides the token.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Generic, Protocol, TypeVar

from asgi_realtime.core.config import Span

R = TypeVar("R")

TOKEN_EXPIRES_IN = "1h"
"""How long the token of a handle lasts, unless it is said otherwise."""


def run_scopes(run_id: str) -> list[str]:
    """What the token of a run's handle admits to: reading the run, and sending into it."""
    return [f"read:runs:{run_id}", f"write:inputStreams:{run_id}"]


def batch_scopes(batch_id: str) -> list[str]:
    """What the token of a batch's handle admits to: reading the batch and its runs."""
    return [f"read:batch:{batch_id}"]


class ResultWaiter(Protocol):
    """Waits for the result of a run, as `Realtime.result` does."""

    def __call__(self, run_id: str, /, *, timeout: Span | None = None) -> Awaitable[Any]: ...


class _Handle(dict[str, Any]):
    """A dict that keeps its token out of logs."""

    @property
    def id(self) -> str:
        """The id of the run or batch."""
        value: str = self["id"]
        return value

    @property
    def public_access_token(self) -> str:
        """A token that reads this and nothing else."""
        value: str = self["publicAccessToken"]
        return value

    @property
    def is_cached(self) -> bool:
        """The idempotency key had been used before: this is the run of that time."""
        return bool(self["isCached"])

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}>"

    __str__ = __repr__


class RunHandle(_Handle, Generic[R]):
    """A run that was started: `{"id", "publicAccessToken", "isCached"}`."""

    __slots__ = ("_result",)

    def __init__(self, run_id: str, token: str, *, is_cached: bool, result: ResultWaiter) -> None:
        super().__init__(id=run_id, publicAccessToken=token, isCached=is_cached)
        self._result = result

    async def result(self, *, timeout: Span | None = None) -> R:
        """Wait until the run is over and return its output.

        Raises `RunFailed` or `RunCanceled` if it ended otherwise, `TimeoutError` after `timeout`, `RunNotFound`.
        Cancelling the caller does not cancel the run.
        """
        output: R = await self._result(self.id, timeout=timeout)
        return output


class BatchHandle(_Handle):
    """A batch that was started: `{"id", "publicAccessToken", "isCached", "runs", "runCount"}`.

    Its one token reads the batch and each of its runs. `runs` are the ids, in the order of the items.
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
        """Wait for all runs and return their outputs, in order. Raises as `RunHandle.result` does."""
        return [await self._result(run_id, timeout=timeout) for run_id in self.runs]
