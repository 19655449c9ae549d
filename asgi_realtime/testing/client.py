"""A client for the tests of an ASGI app: it starts the app, and its responses are live.

No sockets, no cookies, no redirects; each request is one call of the app, as a server makes it.
"""

from __future__ import annotations

import json as json_text
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any
from urllib.parse import unquote, urlencode

from asgi_realtime.testing import driver
from asgi_realtime.testing.driver import App, Response, StreamedResponse, at_most
from asgi_realtime.testing.lifespan import Lifespan

TIMEOUT_S = 10.0

Query = Mapping[str, str] | str


class AsgiClient:
    """`async with AsgiClient(app) as client:` starts the app, and shuts it down at the end.

    Works on asyncio and trio, and may be left in another task than it was entered in, as fixtures are. A start-up that
    fails raises. `lifespan=False` is for an app that somebody else started. `headers` and `token` go with every
    request. `timeout` is how many seconds anything may take: the start-up, an answer, a chunk, an event; None is for
    ever. What the app raises while it answers is raised to whoever asked.
    """

    def __init__(
        self,
        app: App,
        *,
        headers: Mapping[str, str] | None = None,
        token: str | None = None,
        lifespan: bool = True,
        timeout: float | None = TIMEOUT_S,
    ) -> None:
        self.app = app
        self.headers = {"host": "localhost", **_lower(headers)}
        self.token = token
        self.timeout = timeout
        self._lifespan = lifespan
        self._life: Lifespan | None = None

    async def __aenter__(self) -> AsgiClient:
        if self._lifespan:
            life = Lifespan(self.app, timeout=self.timeout)
            await life.start()
            self._life = life
        return self

    async def __aexit__(self, exc_type: type[BaseException] | None, *exc_info: object) -> None:
        life, self._life = self._life, None
        if life is None:
            return
        try:
            await life.stop()
        except Exception:
            if exc_type is None:
                raise  # if not, the first failure is the one to see

    def stream(
        self,
        path: str,
        *,
        method: str = "GET",
        query: Query = "",
        headers: Mapping[str, str] | None = None,
        token: str | None = None,
        last_event_id: str | None = None,
        json: Any = None,
        body: bytes = b"",
        timeout: float | None = None,
    ) -> AbstractAsyncContextManager[StreamedResponse]:
        """Ask, and give the response once its head is there: `async with client.stream("/events") as response:`.

        As a browser's EventSource it accepts `text/event-stream`, unless a header says otherwise.
        Leaving it is the client that goes away: the app gets `http.disconnect`, and is cancelled if it takes no notice
        for 2 seconds. Behind a complete answer it may go on, as background tasks do; at the end of the client it is
        waited for as long. Raises `TimeoutError` for an app that does not answer, and what the app raised.
        """
        sent = {"accept": "text/event-stream", **self.headers, **_lower(headers)}
        token = self.token if token is None else token
        if token is not None:
            sent["authorization"] = f"Bearer {token}"
        if last_event_id is not None:
            sent["last-event-id"] = last_event_id
        if json is not None:
            sent.setdefault("content-type", "application/json")
            body = json_text.dumps(json).encode()
        if body:
            sent.setdefault("content-length", str(len(body)))
        path, _, own_query = path.partition("?")
        parts = [own_query, query if isinstance(query, str) else urlencode(query)]
        scope = driver.make_scope(method, unquote(path), query="&".join(filter(None, parts)), headers=sent)
        if self._life is not None:
            scope["state"] = self._life.state.copy()
        return driver.stream(
            self.app,
            method,
            path,
            scope=scope,
            body=body,
            timeout=self.timeout if timeout is None else timeout,
            spawn=None if self._life is None else self._life.spawn,
        )

    async def request(self, method: str, path: str, *, timeout: float | None = None, **options: Any) -> Response:
        """Ask and read the whole answer. Options are those of `stream`; `timeout` is for all of it."""
        seconds = self.timeout if timeout is None else timeout
        options["headers"] = {"accept": "*/*", **self.headers, **_lower(options.get("headers"))}
        async with self.stream(path, method=method, timeout=seconds, **options) as streamed:
            body = b""

            def told() -> str:
                return (
                    f"{method} {path}: {streamed.status}, and no end of the body in {seconds:g} s; it is {body[:500]!r}"
                )

            with at_most(seconds, told):
                async for chunk in streamed:
                    body += chunk
            return Response(streamed, body)

    async def get(self, path: str, **options: Any) -> Response:
        """`request("GET", …)`."""
        return await self.request("GET", path, **options)

    async def post(self, path: str, **options: Any) -> Response:
        """`request("POST", …)`: `await client.post("/runs", json={"topic": "tea"})`."""
        return await self.request("POST", path, **options)


def _lower(headers: Mapping[str, str] | None) -> dict[str, str]:
    return {name.lower(): value for name, value in (headers or {}).items()}
