"""The checks of `doctor`, one after the other. Needs httpx, from the extra `client`."""

from __future__ import annotations

import json
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx

from asgi_realtime.cli.findings import Finding, Mark
from asgi_realtime.core.config import EXPOSED_HEADERS
from asgi_realtime.core.errors import UsageError
from asgi_realtime.core.event_stream import EventParser

TIMEOUT_S = 15.0
ENCODINGS = "gzip, deflate, br, zstd"
"""What browsers accept."""

READABLE = frozenset({"identity", "gzip", "deflate"})
"""Encodings that httpx decodes without further packages. For others, it is enough to know that they are used."""

BUNCHED = 0.5
"""A stream counts as buffered if its events arrive within less than this part of the time in which they were sent."""

SKEW_S, BAD_SKEW_S = 5.0, 60.0

REQUEST_HEADERS = ("authorization", "last-event-id", "trigger-version")
"""Headers that cross-origin clients send, so a preflight must allow them."""


def examine(url: str, origin: str | None) -> Iterator[Finding]:
    """All findings, most fundamental first."""
    with make_http() as http:
        yield from check_health(http, url)
        yield check_version(url)
        yield from check_stream(http, url)
        if origin is not None:
            yield from check_cors(http, url, origin)


def make_http() -> httpx.Client:
    return httpx.Client(timeout=TIMEOUT_S, follow_redirects=False, verify=ssl.create_default_context())


def check_health(http: httpx.Client, url: str) -> Iterator[Finding]:
    try:
        response = http.get(f"{url}/v1/health")
    except (httpx.InvalidURL, UnicodeError) as exc:
        raise UsageError(f"{url!r} is not a URL: {exc}") from None
    except httpx.HTTPError as exc:
        yield Finding(
            Mark.BAD, f"{url} cannot be reached: {exc or type(exc).__name__}", _connection_cure(exc), ends=True
        )
        return
    if response.is_redirect:
        text = f"{url} redirects to {response.headers.get('location', 'nowhere')}"
        yield Finding(Mark.BAD, text, "Use the target URL: a cross-origin EventSource does not follow.", ends=True)
        return
    try:
        health = response.json()
        status, broker = health["status"], health["broker"]
    except (ValueError, TypeError, KeyError):
        text = f"no Realtime responds at {url}: /v1/health returns {response.status_code}"
        cure = "URL must be the origin and the mount path. An HTML page comes from a proxy or from the host app."
        yield Finding(Mark.BAD, text, cure, ends=True)
        return
    if status == "ok":
        yield Finding(Mark.GOOD, f"healthy, broker {broker}")
    else:
        cure = {"closing": "It is shutting down; try again."}.get(status, "Check the log of the server.")
        yield Finding(Mark.BAD, f"not healthy: {status}, broker {broker}", cure)
    for warning in health.get("warnings", []):
        yield Finding(Mark.NOTE, warning)


def _connection_cure(error: httpx.HTTPError) -> str:
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return (
            "Browsers reject it too, unless they trust its issuer. Serve the whole chain, for this host name; for a"
            " private CA, set SSL_CERT_FILE."
        )
    return "Check that the server runs, that the port is right, and that no firewall blocks it."


def check_version(url: str) -> Finding:
    """The HTTP version a browser would use: version 2 only over TLS, if the server offers it (ALPN, RFC 7301)."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    if parts.scheme == "https":
        context = ssl.create_default_context()
        context.set_alpn_protocols(["h2", "http/1.1"])
        try:
            with (
                socket.create_connection((parts.hostname, parts.port or 443), timeout=TIMEOUT_S) as plain,
                context.wrap_socket(plain, server_hostname=parts.hostname) as secured,
            ):
                if secured.selected_alpn_protocol() == "h2":
                    return Finding(Mark.GOOD, "HTTP/2: many streams share one connection")
        except OSError as exc:
            return Finding(Mark.BAD, f"no TLS connection: {exc}", "Check the certificate of the server.")
    text = "HTTP/1.1: with six open streams, a browser blocks all further requests to this origin"
    cure = "Browsers open six connections per origin, across all tabs. Put a proxy with TLS and HTTP/2 in front."
    return Finding(Mark.NOTE, text, cure)


@dataclass
class Arrivals:
    """One reading of the probe stream of /v1/health. Times are in seconds."""

    response: httpx.Response
    sent: list[float] = field(default_factory=list)
    """By the clock of the server."""
    arrived: list[float] = field(default_factory=list)
    """By the monotonic clock."""
    wall: list[float] = field(default_factory=list)
    """By the clock of this machine."""
    ended: bool = False

    @property
    def bunched(self) -> bool:
        return len(self.sent) > 1 and self._spread(self.arrived) < BUNCHED * self._spread(self.sent)

    @property
    def delay_s(self) -> float:
        return max(0.0, self._spread(self.sent) - self._spread(self.arrived))

    @staticmethod
    def _spread(times: list[float]) -> float:
        return times[-1] - times[0]


def read_probe(http: httpx.Client, url: str, encodings: str = ENCODINGS) -> Arrivals:
    """Read the probe stream. Raises `httpx.HTTPError`."""
    headers = {"accept": "text/event-stream", "accept-encoding": encodings}
    with http.stream("GET", f"{url}/v1/health", headers=headers) as response:
        found, parser = Arrivals(response), EventParser()
        if response.status_code != 200 or _encoding(response) not in READABLE:
            return found
        for data in response.iter_bytes():
            arrived, wall = time.monotonic(), time.time()
            for event in parser.feed(data):
                if event.event == "probe":
                    found.sent.append(json.loads(event.data)["sentAt"] / 1000)
                    found.arrived.append(arrived)
                    found.wall.append(wall)
                found.ended = found.ended or event.event == "end"
    return found


def check_stream(http: httpx.Client, url: str) -> Iterator[Finding]:
    try:
        browser = probe = read_probe(http, url)
        if not probe.sent and _encoding(probe.response) not in READABLE:
            probe = read_probe(http, url, "identity")
        first_bunched = probe.bunched
        if first_bunched:  # perhaps this machine was slow: read again
            probe = read_probe(http, url, probe.response.request.headers["accept-encoding"])
    except (httpx.HTTPError, ValueError, KeyError) as exc:
        cure = "A proxy may close connections early; check its timeouts and its log."
        yield Finding(Mark.BAD, f"the stream broke off: {exc or type(exc).__name__}", cure)
        return
    yield from _check_head(browser.response)
    if probe.response.status_code == 429:
        text = "streaming was not checked: the server has reached its limit of concurrent probes (429)"
        yield Finding(Mark.BAD, text, "Try again in a moment.")
        return
    if not probe.sent or not probe.ended:
        content_type = probe.response.headers.get("content-type", "no content type")
        text = f"no stream arrives: {probe.response.status_code}, {content_type}"
        yield Finding(Mark.BAD, text, "The server may have an older version, or a proxy responds in its place.")
        return
    if first_bunched and probe.bunched:
        text = f"something buffers the stream: {len(probe.sent)} events arrived at once, {probe.delay_s:.1f} s late"
        cure = "Turn off buffering for this path. In nginx: proxy_buffering off; and no gzip of text/event-stream."
        yield Finding(Mark.BAD, text, cure)
    else:
        yield Finding(Mark.GOOD, f"{len(probe.sent)} events arrived one by one, as they were sent")
    yield check_clock(probe)


def _encoding(response: httpx.Response) -> str:
    encoding: str = response.headers.get("content-encoding", "identity")
    return encoding.strip().lower()


def _check_head(response: httpx.Response) -> Iterator[Finding]:
    encoding = _encoding(response)
    if encoding != "identity":
        cure = "Exclude text/event-stream from compression in the proxy or host app: each event costs CPU and memory."
        yield Finding(Mark.NOTE, f"the stream is compressed ({encoding})", cure)
    elif response.status_code == 200:
        yield Finding(Mark.GOOD, "the stream is not compressed")
    if "no-transform" not in response.headers.get("cache-control", "") and response.status_code == 200:
        cure = "Forward the header as the server sends it; otherwise caches may change the stream."
        yield Finding(Mark.NOTE, "cache-control has lost its no-transform", cure)


def check_clock(found: Arrivals) -> Finding:
    """Compare the clocks. An event arrives a moment after it was sent; any other difference is that of the clocks."""
    ahead_s = [sent - wall for sent, wall in zip(found.sent, found.wall, strict=True)]
    skew_s = max(ahead_s)
    if abs(skew_s) < SKEW_S:
        return Finding(Mark.GOOD, "the clocks agree")
    text = f"the server's clock is {abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} this machine's"
    cure = "Tokens created on one machine expire early or late on the other. Synchronize both clocks with NTP."
    return Finding(Mark.BAD if abs(skew_s) >= BAD_SKEW_S else Mark.NOTE, text, cure)


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
