"""The route table, and how a request finds its row.

To add a route, add a row. `{name}` matches one path segment and is passed to the endpoint as an argument, in order; a
final `*` matches any number of segments and is not passed. A path belongs to the first pattern that matches it, and the
request to the first row of that pattern that matches its method and passes `when`. Rows of the Trigger.dev dialect and
rows for other clients can thus share a pattern.

Patterns under `api/` belong to the management API, which `Realtime(api=False)` removes, and those that begin with
`inspect` to the inspector, which is off by default.

Hosts pass paths differently. `scope["path"]` can include the mount's prefix (Starlette) or not (Litestar, which also
appends a slash), and the `root_path` of a proxy or not. `resolve` therefore tries every candidate, and the first one
that matches a pattern wins. A leading `realtime` is optional, so that both values of `baseURL` that the official
clients use work. A leading `api` is optional for hosts that mount the app at `/api` and strip it. Nothing is
redirected, because a cross-origin EventSource does not follow redirects reliably.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from starlette.responses import Response

from asgi_realtime.asgi import browser_module, feeds, health, inspector, metrics
from asgi_realtime.asgi.protocol_streams import ConvertedResponse
from asgi_realtime.asgi.request import Request
from asgi_realtime.asgi.streams import StreamResponse
from asgi_realtime.asgi.subscription import SubscriptionResponse
from asgi_realtime.asgi.trigger_dev import batches, metadata, runs, shape_polls, stream_writers, tokens
from asgi_realtime.asgi.trigger_dev.batch_streams import BatchStreamResponse

MAX_PREFIXES = 2
"""How many leading `realtime` segments are skipped: the mount's, if the host does not declare it, and the client's."""

AnyResponse = Response | SubscriptionResponse[Any]


class Route(NamedTuple):
    """One row of the table."""

    method: str
    pattern: str
    endpoint: Callable[..., Awaitable[AnyResponse]]
    """Called with the request and the variable segments of the path."""
    when: Callable[[Request], bool] = lambda request: True
    needs_token: bool = True
    """The request is authenticated before the endpoint is called."""
    needs_start: bool = True
    """The `Realtime` is started before the endpoint is called."""
    reconnects: bool = False
    """A shutdown that interrupts the endpoint is answered with an event `reconnect` instead of 503."""
    open_ended: bool = False
    """The body lasts as long as its source: silence is limited by `Timeouts.writer` instead of `Timeouts.receive`."""


ROUTES = (
    Route("GET", "v1/streams/{run_id}/{key}", ConvertedResponse.converted, when=Request.names_protocol),
    Route("GET", "v1/streams/{run_id}/{key}", BatchStreamResponse.stream, when=Request.is_official),
    Route("GET", "v1/streams/{run_id}/{key}", StreamResponse.stream, reconnects=True),
    Route("GET", "v1/streams/{run_id}/input/{input_id}", BatchStreamResponse.tail_input, when=Request.is_official),
    Route("GET", "v1/streams/{run_id}/input/{input_id}", StreamResponse.tail_input, reconnects=True),
    Route("POST", "v1/streams/{run_id}/input/{input_id}", stream_writers.send_input),
    Route("PUT", "v1/streams/{run_id}/{target}/{key}", stream_writers.create_stream),
    Route("POST", "v1/streams/{run_id}/{target}/{key}", stream_writers.write_stream, open_ended=True),
    Route("HEAD", "v1/streams/{run_id}/{target}/{key}", stream_writers.last_index),
    Route("POST", "v1/streams/{run_id}/{target}/{key}/append", stream_writers.append),
    Route("GET", "v1/runs", feeds.tag_feed, when=Request.accepts_events, reconnects=True),
    Route("GET", "v1/runs", shape_polls.tag_feed),
    Route("GET", "v1/runs/{run_id}", feeds.run_feed, when=Request.accepts_events, reconnects=True),
    Route("GET", "v1/runs/{run_id}", shape_polls.run_feed),
    Route("GET", "v1/batches/{batch_id}", feeds.batch_feed, when=Request.accepts_events, reconnects=True),
    Route("GET", "v1/batches/{batch_id}", shape_polls.batch_feed),
    Route("GET", "v1/health", health.probe, when=Request.accepts_events, needs_token=False, reconnects=True),
    Route("GET", "v1/health", health.check, needs_token=False, needs_start=False),
    Route("HEAD", "v1/health", health.check, needs_token=False, needs_start=False),
    Route("GET", "v1/metrics", metrics.scrape, needs_token=False, needs_start=False),
    Route("GET", "client.js", browser_module.current, needs_token=False, needs_start=False),
    Route("HEAD", "client.js", browser_module.current, needs_token=False, needs_start=False),
    Route("GET", "client-{hash}.js", browser_module.versioned, needs_token=False, needs_start=False),
    Route("HEAD", "client-{hash}.js", browser_module.versioned, needs_token=False, needs_start=False),
    Route("GET", "inspect", inspector.page, needs_token=False, needs_start=False),
    Route("GET", "inspector.js", inspector.script, needs_token=False, needs_start=False),
    Route("GET", "inspector.css", inspector.style, needs_token=False, needs_start=False),
    Route("GET", "inspect/inspector.js", inspector.script, needs_token=False, needs_start=False),
    Route("GET", "inspect/inspector.css", inspector.style, needs_token=False, needs_start=False),
    Route("POST", "inspect/token", inspector.create_token, needs_token=False),
    Route("GET", "inspect/runs", inspector.list_runs),
    Route("GET", "inspect/runs/{run_id}", inspector.retrieve_run),
    Route("POST", "inspect/runs/{run_id}/cancel", runs.cancel_run),
    Route("POST", "api/v1/tasks/{task_id}/trigger", runs.trigger),
    Route("POST", "api/v3/batches", batches.create_batch),
    Route("POST", "api/v3/batches/{batch_id}/items", batches.fill_batch),
    Route("GET", "api/v2/batches/{batch_id}", batches.retrieve_batch),
    Route("GET", "api/v3/runs/{run_id}", runs.retrieve_run),
    Route("POST", "api/v2/runs/{run_id}/cancel", runs.cancel_run),
    Route("GET", "api/v1/runs/{run_id}/metadata", metadata.retrieve_metadata),
    Route("PUT", "api/v1/runs/{run_id}/metadata", metadata.update_metadata),
    Route("POST", "api/v1/runs/{run_id}/tags", runs.add_tags),
    Route("POST", "api/v1/auth/jwt/claims", tokens.jwt_claims),
    Route("POST", "api/v1/auth/public-tokens", tokens.public_token),
    Route("GET", "api/v1/packets/*", runs.packets),
    Route("PUT", "api/v1/packets/*", runs.packets),
    Route("GET", "api/v2/packets/*", runs.packets),
    Route("PUT", "api/v2/packets/*", runs.packets),
)


class Match(NamedTuple):
    """The pattern of a path, with the values of its variable segments."""

    pattern: str
    params: tuple[str, ...] = ()

    @property
    def is_api(self) -> bool:
        return self.pattern.startswith("api/")

    @property
    def is_inspector(self) -> bool:
        return self.pattern.startswith("inspect")

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(route.method for route in _ROUTES_OF[self.pattern]))

    def route(self, request: Request) -> Route | None:
        """The row for the request, or None if its method is not allowed."""
        for route in _ROUTES_OF[self.pattern]:
            if route.method == request.method and route.when(request):
                return route
        return None


def _compile(pattern: str) -> re.Pattern[str]:
    regex = pattern.replace(".", r"\.").replace("/*", "(?:/[^/]+)*").replace("api/", "(?:api/)?")
    regex = re.sub(r"\{\w+\}", "([^/]+)", regex)
    return re.compile(f"(?:realtime/){{0,{MAX_PREFIXES}}}{regex}")


_ROUTES_OF = {route.pattern: [row for row in ROUTES if row.pattern == route.pattern] for route in ROUTES}
_PATTERNS = [(_compile(pattern), pattern) for pattern in _ROUTES_OF]


def resolve(path: str, root_path: str = "") -> Match | None:
    """Find the pattern of a request's path: without the root path, without each suffix of that (a proxy can have
    removed the front), or whole."""
    if not path.startswith("/"):
        return None  # Litestar passes `/realtimeX` to a mount at `/realtime` as `X/`
    path, root = path.strip("/"), root_path.strip("/")
    while root:
        if path.startswith(f"{root}/"):
            found = _match(path[len(root) + 1 :])
            if found is not None:
                return found
        root = root.partition("/")[2]
    return _match(path)


def _match(path: str) -> Match | None:
    for regex, pattern in _PATTERNS:
        found = regex.fullmatch(path)
        if found is not None:
            return Match(pattern, found.groups())
    return None
