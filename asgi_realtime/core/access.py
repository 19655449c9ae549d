"""What the `authorize` of a host is asked, and what it can answer.

A host that knows its users by a session can let it replace the token. Its function gets the HTTP request and a
`Resource`: what the request asks for. The answer is as good as a token with the same scopes, for this one request.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from asgi_realtime.core.errors import InvalidConfiguration, shown
from asgi_realtime.core.scopes import Scopes


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """What a request without a token asks for, by the names in its URL. Nothing says that they exist.

    | `kind` | `action` | names |
    |---|---|---|
    | `"run"` | `"read"`; `"write"` to cancel it | `run_id` |
    | `"stream"` | `"read"` | `run_id`, `key` |
    | `"input"` | `"read"`; `"write"` to send to it | `run_id`, `key` |
    | `"runs"`, the runs that have all of the tags | `"read"` | `tags` |
    | `"batch"` | `"read"`; `"batchTrigger"` to create or fill it | `batch_id`, except to create it |
    | `"task"` | `"trigger"` | `task` |
    """

    action: Literal["read", "write", "trigger", "batchTrigger"]
    kind: Literal["run", "stream", "input", "runs", "batch", "task"]
    run_id: str | None = None
    key: str | None = None
    """The key of the stream, or the id of the input."""
    tags: tuple[str, ...] = ()
    batch_id: str | None = None
    task: str | None = None

    @property
    def scopes(self) -> tuple[str, ...]:
        """The scopes that grant this and as little else as possible."""
        if self.kind == "runs":
            return tuple(f"read:tags:{tag}" for tag in self.tags)
        if self.kind == "task":
            return (f"trigger:tasks:{self.task}",)
        if self.kind == "batch":  # the tasks of a new batch are in its body
            return (f"read:batch:{self.batch_id}",) if self.action == "read" else ("batchTrigger:batch",)
        if self.kind == "input" and self.action == "write":
            return (f"write:inputStreams:{self.run_id}",)
        return (f"{self.action}:runs:{self.run_id}",)


@dataclass(frozen=True, slots=True)
class Grant:
    """What a request without a token is granted, as `authorize` returns it.

    `scopes` are those of `create_public_token`; None grants what the request asks for. `owner`, such as `"user:1"`, is
    charged for the request as it is for the tokens of that owner; a request that triggers runs needs one.
    `skip_columns` and `tags` are those of `create_public_token` and `create_trigger_public_token`.
    """

    scopes: Scopes | None = None
    owner: str | None = None
    skip_columns: Iterable[str] = ()
    tags: str | Iterable[str] | None = None


Granted = Grant | Scopes | bool | None
"""True grants what the request asks for; scopes grant what a token with them would; False and None grant nothing."""

Authorize = Callable[[Any, Resource], Granted | Awaitable[Granted]]
"""Called with the Starlette `Request`, without its body, and the resource."""

AuthorizeInspector = Callable[[Any], bool | Awaitable[bool]]
"""Called with the Starlette `Request`, without its body."""

F = TypeVar("F", bound=Callable[..., Any])


def check_function(function: F | None, *, name: str) -> F | None:
    """Raises `InvalidConfiguration` for what cannot be called."""
    if function is not None and not callable(function):
        raise InvalidConfiguration(f"{name} is {shown(function)}; allowed is a function, which gets the request")
    return function
