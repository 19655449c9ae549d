"""From a request's path to one of our endpoints, whatever host passes it on.

Hosts differ: `path` comes with the mount's prefix (Starlette), without (Litestar, which adds a slash at the end), and
with or without the `root_path` of a proxy in front. So each candidate is tried, and the first that is one of our
routes wins. `realtime` may stand before a route, so that both `baseURL`s of the official clients work, and `api` may be
missing where a host mounts this at `/api` and takes that off. Nothing is redirected: that is trouble for a cross-origin
EventSource.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum, auto
from typing import NamedTuple

MAX_PREFIXES = 2
"""How many leading `realtime` are passed over: the mount's own, where a host does not say so, and the client's."""


class Endpoint(Enum):
    """What we answer."""

    RUN_FEED = auto()
    TAG_FEED = auto()
    BATCH_FEED = auto()
    STREAM = auto()
    WRITE_STREAM = auto()
    APPEND = auto()
    INPUT = auto()
    HEALTH = auto()
    TRIGGER = auto()
    CREATE_BATCH = auto()
    BATCH_ITEMS = auto()
    RETRIEVE_BATCH = auto()
    RETRIEVE_RUN = auto()
    CANCEL_RUN = auto()
    UPDATE_METADATA = auto()
    ADD_TAGS = auto()
    JWT_CLAIMS = auto()
    PUBLIC_TOKENS = auto()
    PACKETS = auto()


API = frozenset(
    {
        Endpoint.TRIGGER,
        Endpoint.CREATE_BATCH,
        Endpoint.BATCH_ITEMS,
        Endpoint.RETRIEVE_BATCH,
        Endpoint.RETRIEVE_RUN,
        Endpoint.CANCEL_RUN,
        Endpoint.UPDATE_METADATA,
        Endpoint.ADD_TAGS,
        Endpoint.JWT_CLAIMS,
        Endpoint.PUBLIC_TOKENS,
        Endpoint.PACKETS,
    }
)
"""The endpoints under `/api/`, which `Realtime(api=False)` does not have."""


class Route(NamedTuple):
    """An endpoint and the variable segments of its path, in their order."""

    endpoint: Endpoint
    params: tuple[str, ...] = ()


def resolve(path: str, root_path: str = "") -> Route | None:
    """Return the route that a request asks for, or None."""
    if not path.startswith("/"):
        return None  # `/realtimeX` in a Litestar mount at `/realtime` arrives as `X/`
    for candidate in _candidates(_split(path), _split(root_path)):
        route = _match(candidate)
        if route is not None:
            return route
    return None


def _split(path: str) -> list[str]:
    stripped = path.strip("/")
    return stripped.split("/") if stripped else []


def _candidates(path: list[str], root: list[str]) -> Iterator[list[str]]:
    """The path less the root path, less each end of it (a proxy may have taken the begin), and as it is."""
    for start in range(len(root)):
        prefix = root[start:]
        if path[: len(prefix)] == prefix:
            yield path[len(prefix) :]
    yield path


def _match(segments: list[str]) -> Route | None:
    for _ in range(MAX_PREFIXES):
        if segments[:1] == ["realtime"]:
            segments = segments[1:]
    if "" in segments:
        return None
    if segments[:1] == ["api"]:
        return _match_api(segments[1:])
    return _match_realtime(segments) or _match_api(segments)


def _match_realtime(segments: list[str]) -> Route | None:
    match segments:
        case ["v1", "streams", run_id, key]:
            return Route(Endpoint.STREAM, (run_id, key))
        case ["v1", "streams", run_id, "input", input_id]:
            return Route(Endpoint.INPUT, (run_id, input_id))
        case ["v1", "streams", run_id, target, key]:
            return Route(Endpoint.WRITE_STREAM, (run_id, target, key))
        case ["v1", "streams", run_id, target, key, "append"]:
            return Route(Endpoint.APPEND, (run_id, target, key))
        case ["v1", "runs"]:
            return Route(Endpoint.TAG_FEED)
        case ["v1", "runs", run_id]:
            return Route(Endpoint.RUN_FEED, (run_id,))
        case ["v1", "batches", batch_id]:
            return Route(Endpoint.BATCH_FEED, (batch_id,))
        case ["v1", "health"]:
            return Route(Endpoint.HEALTH)
        case _:
            return None


def _match_api(segments: list[str]) -> Route | None:
    match segments:
        case ["v1", "tasks", task_id, "trigger"]:
            return Route(Endpoint.TRIGGER, (task_id,))
        case ["v3", "batches"]:
            return Route(Endpoint.CREATE_BATCH)
        case ["v3", "batches", batch_id, "items"]:
            return Route(Endpoint.BATCH_ITEMS, (batch_id,))
        case ["v2", "batches", batch_id]:
            return Route(Endpoint.RETRIEVE_BATCH, (batch_id,))
        case ["v3", "runs", run_id]:
            return Route(Endpoint.RETRIEVE_RUN, (run_id,))
        case ["v2", "runs", run_id, "cancel"]:
            return Route(Endpoint.CANCEL_RUN, (run_id,))
        case ["v1", "runs", run_id, "metadata"]:
            return Route(Endpoint.UPDATE_METADATA, (run_id,))
        case ["v1", "runs", run_id, "tags"]:
            return Route(Endpoint.ADD_TAGS, (run_id,))
        case ["v1", "auth", "jwt", "claims"]:
            return Route(Endpoint.JWT_CLAIMS)
        case ["v1", "auth", "public-tokens"]:
            return Route(Endpoint.PUBLIC_TOKENS)
        case ["v1" | "v2", "packets", *_]:
            return Route(Endpoint.PACKETS)
        case _:
            return None
