"""The calls that create public tokens for browsers, and verify them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from asgi_realtime.calls.parts import Parts
from asgi_realtime.core.config import Span
from asgi_realtime.core.names import check_key, check_tags
from asgi_realtime.core.scopes import flatten_scopes
from asgi_realtime.tasks.task import TaskLike, id_of
from asgi_realtime.tokens import PUBLIC_TOKEN_EXPIRES_IN, Claims, check_columns, check_owner


class TokenCalls(Parts):
    """Public tokens."""

    def create_public_token(
        self,
        *,
        scopes: Mapping[str, Any] | Sequence[str],
        expires_in: Span = PUBLIC_TOKEN_EXPIRES_IN,
        skip_columns: Iterable[str] = (),
        owner: str | None = None,
    ) -> str:
        """Create a token for a browser. `scopes` is like `{"read": {"runs": [run.id], "tags": ["user:1"]}}`, or a list
        of strings.

        `skip_columns`, such as `["payload", "metadata"]`, are omitted from every run that the token reads. The names
        are the columns of the run feed, such as `runTags`. `owner`, such as `"user:1"`, is charged for what arrives
        with the token: all tokens of one owner share its budgets (`Limits`, per owner). Without it, each token is an
        owner of its own. Raises `UsageError` for an unknown name, an empty list, or a scope that grants nothing.
        """
        seconds = self._life_s(expires_in, name="expires_in")
        return self.tokens.mint(
            flatten_scopes(scopes),
            expires_in_s=seconds,
            own_id=True,
            skip_columns=check_columns(skip_columns),
            owner=check_owner(owner),
        )

    def create_trigger_public_token(
        self,
        tasks: TaskLike | Sequence[TaskLike],
        *,
        multiple_use: bool = False,
        expires_in: Span = PUBLIC_TOKEN_EXPIRES_IN,
        skip_columns: Iterable[str] = (),
        owner: str | None = None,
        tags: str | Iterable[str] | None = None,
    ) -> str:
        """Create a token with which a browser can trigger these tasks once; with `multiple_use`, any number of times.

        `skip_columns` and `owner` also apply to the token that the browser receives with the run; see
        `create_public_token`. With `tags`, the browser can give the run these tags and no others, so that it does not
        appear in the lists of other users; they are not added by themselves. Without `tags` it can choose any.
        """
        return self._mint_for_tasks("trigger", tasks, multiple_use, expires_in, skip_columns, owner, tags)

    def create_batch_trigger_public_token(
        self,
        tasks: TaskLike | Sequence[TaskLike],
        *,
        multiple_use: bool = False,
        expires_in: Span = PUBLIC_TOKEN_EXPIRES_IN,
        skip_columns: Iterable[str] = (),
        owner: str | None = None,
        tags: str | Iterable[str] | None = None,
    ) -> str:
        """As `create_trigger_public_token`, for a batch of these tasks."""
        return self._mint_for_tasks("batchTrigger", tasks, multiple_use, expires_in, skip_columns, owner, tags)

    def _mint_for_tasks(
        self,
        action: str,
        tasks: TaskLike | Sequence[TaskLike],
        multiple_use: bool,
        expires_in: Span,
        skip_columns: Iterable[str],
        owner: str | None,
        tags: str | Iterable[str] | None,
    ) -> str:
        listed = [tasks] if isinstance(tasks, str) or not isinstance(tasks, Iterable) else tasks
        ids = [check_key(id_of(task), self.limits, what="task id") for task in listed]
        scopes = flatten_scopes({action: {"tasks": ids}})
        seconds = self._life_s(expires_in, name="expires_in")
        return self.tokens.mint(
            scopes,
            expires_in_s=seconds,
            own_id=True,
            one_time=not multiple_use,
            skip_columns=check_columns(skip_columns),
            tags=None if tags is None else check_tags(tags, self.limits),
            owner=check_owner(owner),
        )

    def verify_token(self, token: str) -> Claims:
        """The claims of a token. Raises `InvalidToken`, `ExpiredToken`."""
        return self.tokens.verify(token)
