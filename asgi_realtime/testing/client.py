"""A client for tests of an ASGI app. It starts the app, and its responses are live.

No sockets, no cookies, no redirects: each request is one call of the app, as a server makes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, TypedDict, Unpack
from urllib.parse import unquote, urlencode

from asgi_realtime.asgi.host import App
from asgi_realtime.loop.waiting import at_most
from asgi_realtime.testing.driver import call_app, make_scope
from asgi_realtime.testing.lifespan import Lifespan
from asgi_realtime.testing.responses import Response, StreamedResponse

TIMEOUT_S = 10.0


class RequestOptions(TypedDict, total=False):
    """What every request method of `AsgiClient` accepts."""

    query: Mapping[str, str] | str
    """Added to the query in the path."""
    headers: Mapping[str, str]
    """Override the headers of the client."""
    token: str | None
    """Sent as `Authorization: Bearer`, instead of the token of the client."""
    last_event_id: str | None
    json: Any
    """Sent as the body, with a matching `Content-Type`, unless it is None."""
    body: bytes
    timeout: float | None
    """Seconds, instead of the timeout of the client. None uses that one."""


class AsgiClient:
    """`async with AsgiClient(app) as client:` starts the app, and shuts it down at the end.

    Without `async with`, or with `lifespan=False`, the client only sends requests; the app must not need a start-up, or
    must have been started already. Works on asyncio and trio. The client can be exited in another task than it was
    entered in, as pytest fixtures are. A failing start-up raises here, and so does the app when it raises during a
    request.

    `headers` and `token` are sent with every request. `root_path` is the prefix under which the app is mounted.
    `timeout` limits each wait, in seconds: for the start-up, a response, a chunk, an event. None means no limit.
    """

    def __init__(
        self,
        app: App,
        *,
        headers: Mapping[str, str] | None = None,
        token: str | None = None,
        root_path: str = "",
        lifespan: bool = True,
        timeout: float | None = TIMEOUT_S,
    ) -> None:
        self.app = app
        self.headers = {"host": "localhost", **_lower(headers)}
        self.token = token
        self.root_path = root_path
        self.timeout = timeout
        self._needs_lifespan = lifespan
        self._lifespan: Lifespan | None = None

    async def __aenter__(self) -> AsgiClient:
        if self._needs_lifespan:
            lifespan = Lifespan(self.app)
            await lifespan.start(self.timeout)
            self._lifespan = lifespan
        return self

    async def __aexit__(self, exc_type: type[BaseException] | None, *exc_info: object) -> None:
        lifespan, self._lifespan = self._lifespan, None
        if lifespan is None:
            return
        try:
            await lifespan.stop(self.timeout)
        except Exception:
            if exc_type is None:
                raise  # otherwise the first failure is the one to report

    def stream(
        self, path: str, *, method: str = "GET", **options: Unpack[RequestOptions]
    ) -> AbstractAsyncContextManager[StreamedResponse]:
        """Send a request and enter once the response has started: `async with client.stream("/events") as response:`.

        Like a browser's EventSource it accepts `text/event-stream`, unless a header overrides that. Exiting the block
        early disconnects: the app receives `http.disconnect`, and is cancelled if it does not return within 2 seconds.
        After a complete response the app can continue, as background tasks do; the exit of the client waits up to 2
        seconds for it.

        Raises `TimeoutError` if the app does not respond in time, and whatever the app raises.
        """
        return self._send("text/event-stream", method, path, options)

    async def request(self, method: str, path: str, **options: Unpack[RequestOptions]) -> Response:
        """Send a request and read the whole response; `timeout` limits all of it."""
        timeout_s = self._timeout_s(options)
        async with self._send("*/*", method, path, options) as streamed:
            body = b""
            with at_most(timeout_s, lambda: _unfinished(method, path, streamed, body, timeout_s)):
                async for chunk in streamed:
                    body += chunk
            return Response(streamed, body)

    async def get(self, path: str, **options: Unpack[RequestOptions]) -> Response:
        """`request("GET", …)`."""
        return await self.request("GET", path, **options)

    async def post(self, path: str, **options: Unpack[RequestOptions]) -> Response:
        """`request("POST", …)`: `await client.post("/runs", json={"topic": "tea"})`."""
        return await self.request("POST", path, **options)

    def _send(
        self, accept: str, method: str, path: str, options: RequestOptions
    ) -> AbstractAsyncContextManager[StreamedResponse]:
        body, headers = self._body_and_headers(accept, options)
        path, _, query = path.partition("?")
        more_query = options.get("query", "")
        queries = [query, more_query if isinstance(more_query, str) else urlencode(more_query)]
        scope = make_scope(
            method, unquote(path), query="&".join(filter(None, queries)), headers=headers, root_path=self.root_path
        )
        if self._lifespan is not None:
            scope["state"] = self._lifespan.state.copy()
        return call_app(
            self.app,
            scope,
            body=body,
            timeout=self._timeout_s(options),
            spawn=None if self._lifespan is None else self._lifespan.spawn,
        )

    def _body_and_headers(self, accept: str, options: RequestOptions) -> tuple[bytes, dict[str, str]]:
        headers = {"accept": accept, **self.headers, **_lower(options.get("headers"))}
        body = options.get("body", b"")
        token = options.get("token")
        if token is None:
            token = self.token
        if token is not None:
            headers["authorization"] = f"Bearer {token}"
        if (last_event_id := options.get("last_event_id")) is not None:
            headers["last-event-id"] = last_event_id
        if (value := options.get("json")) is not None:
            headers.setdefault("content-type", "application/json")
            body = json.dumps(value).encode()
        if body:
            headers.setdefault("content-length", str(len(body)))
        return body, headers

    def _timeout_s(self, options: RequestOptions) -> float | None:
        timeout_s = options.get("timeout")
        return self.timeout if timeout_s is None else timeout_s


def _lower(headers: Mapping[str, str] | None) -> dict[str, str]:
    return {name.lower(): value for name, value in (headers or {}).items()}


def _unfinished(method: str, path: str, response: StreamedResponse, body: bytes, timeout_s: float | None) -> str:
    return (
        f"{method} {path}: responded with {response.status_code}, but the body did not end within {timeout_s:g} s;"
        f" it starts with {body[:500]!r}"
    )
