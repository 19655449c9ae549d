"""The CORS checks of `doctor`: what a browser lets pages of another origin do."""

from __future__ import annotations

from collections.abc import Iterator

import httpx

from asgi_realtime.cli.findings import Finding, Mark
from asgi_realtime.core.config import EXPOSED_HEADERS

REQUEST_HEADERS = ("authorization", "last-event-id", "trigger-version")
"""Headers that cross-origin clients send, so a preflight must allow them."""


def check_cors(http: httpx.Client, url: str, origin: str) -> Iterator[Finding]:
    preflight_headers = {
        "origin": origin,
        "access-control-request-method": "GET",
        "access-control-request-headers": ",".join(sorted(REQUEST_HEADERS)),
    }
    try:
        preflight = http.options(f"{url}/v1/runs/run_1", headers=preflight_headers)
        response = http.get(f"{url}/v1/health", headers={"origin": origin})
    except httpx.HTTPError as exc:
        yield Finding(Mark.BAD, f"CORS was not checked: {exc or type(exc).__name__}")
        return
    yield _check_preflight(preflight, origin)
    yield from _check_response(response, origin)


def _check_preflight(preflight: httpx.Response, origin: str) -> Finding:
    if len(_origins(preflight)) > 1:
        return _duplicate_origins(preflight, "a preflight")
    wrong = [] if preflight.is_success else [f"status {preflight.status_code}"]
    if not _allows(preflight, origin):
        wrong.append("the origin is not allowed")
    allowed = _names(preflight, "access-control-allow-headers")
    # "*" does not include authorization (Fetch, section 4.8)
    missing = [
        name for name in REQUEST_HEADERS if name not in allowed and ("*" not in allowed or name == "authorization")
    ]
    if missing:
        wrong.append(f"not allowed: {', '.join(missing)}")
    if not wrong:
        return Finding(Mark.GOOD, f"CORS: preflight requests from {origin} are allowed")
    cure = f"Realtime(cors=[{origin!r}]), or allow_headers=['*', 'authorization'] in the host app's CORS middleware."
    return Finding(Mark.BAD, f"CORS: preflight requests from {origin} are rejected: {'; '.join(wrong)}", cure)


def _check_response(response: httpx.Response, origin: str) -> Iterator[Finding]:
    if len(_origins(response)) > 1:
        yield _duplicate_origins(response, "a response")
    elif not _allows(response, origin):
        yield Finding(Mark.BAD, f"CORS: pages from {origin} cannot read responses", f"Realtime(cors=[{origin!r}])")
    else:
        yield Finding(Mark.GOOD, f"CORS: pages from {origin} can read responses")
    exposed = _names(response, "access-control-expose-headers")
    missing = [name for name in EXPOSED_HEADERS if name not in exposed]
    if missing and "*" not in exposed:  # "*" includes all without credentials (Fetch, section 3.3.3)
        cure = "expose_headers=asgi_realtime.EXPOSED_HEADERS in the host app's CORS middleware."
        text = f"CORS: pages cannot see {', '.join(missing)}, which the Trigger.dev clients read"
        yield Finding(Mark.NOTE, text, cure)
    else:
        yield Finding(Mark.GOOD, "CORS: all headers that clients read are exposed")


def _origins(response: httpx.Response) -> list[str]:
    """All allowed origins, whether in several headers or comma-separated in one."""
    return response.headers.get_list("access-control-allow-origin", split_commas=True)


def _duplicate_origins(response: httpx.Response, what: str) -> Finding:
    text = f"CORS: {what} has {len(_origins(response))} values of access-control-allow-origin"
    cure = "The proxy or the host app adds CORS headers too. Keep one of them; Realtime(cors=None) leaves it to them."
    return Finding(Mark.BAD, text, cure)


def _allows(response: httpx.Response, origin: str) -> bool:
    return response.headers.get("access-control-allow-origin") in ("*", origin)


def _names(response: httpx.Response, header: str) -> set[str]:
    return {name.strip().lower() for name in response.headers.get(header, "").split(",")}
