"""How a client sends its requests: with which httpx client, timeouts and token. All its subscriptions share it."""

from __future__ import annotations

import inspect
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import httpx

from asgi_realtime.client.arguments import check_base_url, check_token
from asgi_realtime.client.backoff import Backoff
from asgi_realtime.client.protocol import SubscriptionProtocol
from asgi_realtime.core.config import Span, parse_span
from asgi_realtime.core.errors import InvalidConfiguration


class Transport:
    """`http` is created here unless it is passed in; `aclose` closes only one created here."""

    def __init__(
        self,
        base_url: str,
        access_token: str | Callable[[], str | Awaitable[str]],
        connect_timeout: Span,
        silence_timeout: Span,
        give_up_after: Span | None,
        http: httpx.AsyncClient | None,
    ) -> None:
        self.base_url = check_base_url(base_url)
        if isinstance(access_token, str):
            check_token(access_token)
        elif not callable(access_token):
            raise InvalidConfiguration(
                f"access_token is a {type(access_token).__name__}; pass a str or a function that returns one"
            )
        self._access_token = access_token
        connect_s = parse_span(connect_timeout, name="connect_timeout")
        self._silence_s = parse_span(silence_timeout, name="silence_timeout")
        self._timeout = httpx.Timeout(connect_s, read=self._silence_s)
        self._give_up_s = None if give_up_after is None else parse_span(give_up_after, name="give_up_after")
        self.owns_http = http is None
        self._http = http or httpx.AsyncClient(limits=httpx.Limits(max_connections=None))
        self._token_lock: anyio.Lock | None = None  # belongs to the loop of its first use
        self._cached_token: str | None = None
        self.clock: Callable[[], float] = time.monotonic
        self.random: Callable[[], float] = random.random
        self.sleep: Callable[[float], Awaitable[None]] = anyio.sleep

    @property
    def renewable(self) -> bool:
        """A refused token can be replaced."""
        return not isinstance(self._access_token, str)

    def backoff(self) -> Backoff:
        return Backoff(self._give_up_s, self.clock, self.random)

    async def prepare(self, protocol: SubscriptionProtocol[Any]) -> httpx.Request:
        """Wait until the next request of a subscription is due, and build it. Raises what the token function raises."""
        if pause_s := protocol.pause_s:
            await self.sleep(pause_s)
        headers = protocol.headers(await self._token(protocol.refused_token))
        return self._http.build_request("GET", self.base_url + protocol.path, headers=headers, timeout=self._timeout)

    async def send(self, request: httpx.Request) -> httpx.Response:
        """Send a request. The body of the response is still to be read. Raises `httpx.RequestError`."""
        return await self._http.send(request, stream=True, auth=None, follow_redirects=False)

    def describe(self, error: httpx.RequestError) -> str:
        """The error without its request, which holds the token."""
        if isinstance(error, httpx.ReadTimeout):
            return f"nothing was received for {self._silence_s:g} s"
        return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__

    async def aclose(self) -> None:
        if self.owns_http:
            await self._http.aclose()

    async def _token(self, refused: str | None) -> str:
        """A token other than the refused one, if the function returns another."""
        if isinstance(self._access_token, str):
            return self._access_token
        self._token_lock = self._token_lock or anyio.Lock()
        async with self._token_lock:
            if self._cached_token is None or self._cached_token == refused:
                token = self._access_token()
                self._cached_token = check_token(await token if inspect.isawaitable(token) else token)
            return self._cached_token
