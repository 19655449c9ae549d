"""The checks of `doctor`, one after the other. Needs httpx, from the extra `client`."""

from __future__ import annotations

import json
import socket
import ssl
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx

from asgi_realtime.cli.cors_checks import check_cors
from asgi_realtime.cli.findings import Finding, Mark
from asgi_realtime.core.event_stream import EventParser

TIMEOUT_S = 15.0
ENCODINGS = "gzip, deflate, br, zstd"
"""What browsers accept."""

READABLE = frozenset({"identity", "gzip", "deflate"})
"""Encodings that httpx decodes without further packages. For others, it is enough to know that they are used."""

BUNCHED = 0.5
"""A stream counts as buffered if its events arrive within less than this part of the time in which they were sent."""

SKEW_S, BAD_SKEW_S = 5.0, 60.0


def examine(url: str, origin: str | None) -> Iterator[Finding]:
    """All findings, most fundamental first."""
    with make_http() as http:
        if not (yield from check_health(http, url)):
            return
        yield check_version(url)
        yield from check_stream(http, url)
        if origin is not None:
            yield from check_cors(http, url, origin)


def make_http() -> httpx.Client:
    return httpx.Client(timeout=TIMEOUT_S, follow_redirects=False, verify=ssl.create_default_context())


def check_health(http: httpx.Client, url: str) -> Generator[Finding, None, bool]:
    """Return whether a `Realtime` responds, so that other checks make sense."""
    try:
        response = http.get(f"{url}/v1/health")
    except httpx.HTTPError as exc:
        yield Finding(Mark.BAD, f"{url} cannot be reached: {exc or type(exc).__name__}", _connection_cure(exc))
        return False
    if response.is_redirect:
        text = f"{url} redirects to {response.headers.get('location', 'nowhere')}"
        yield Finding(Mark.BAD, text, "Use the target URL: a cross-origin EventSource does not follow.")
        return False
    try:
        health = response.json()
        status, broker = health["status"], health["broker"]
    except (ValueError, TypeError, KeyError):
        text = f"no Realtime responds at {url}: /v1/health returns {response.status_code}"
        cure = "URL must be the origin and the mount path. An HTML page comes from a proxy or from the host app."
        yield Finding(Mark.BAD, text, cure)
        return False
    if status == "ok":
        yield Finding(Mark.GOOD, f"healthy, broker {broker}")
    else:
        cure = {"closing": "It is shutting down; try again."}.get(status, "Check the log of the server.")
        yield Finding(Mark.BAD, f"not healthy: {status}, broker {broker}", cure)
    for warning in health.get("warnings", []):
        yield Finding(Mark.NOTE, warning)
    return True


def _connection_cure(error: httpx.HTTPError) -> str:
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return (
            "Browsers reject it too, unless they trust its issuer. Serve the whole chain, for this host name; for a"
            " private CA, set SSL_CERT_FILE."
        )
    return "Check that the server runs, that the port is right, and that no firewall blocks it."


def check_version(url: str) -> Finding:
    """The HTTP version a browser would use: version 2 only over TLS, if the server offers it."""
    try:
        if _offers_http_2(url):
            return Finding(Mark.GOOD, "HTTP/2: many streams share one connection")
    except OSError as exc:
        return Finding(Mark.BAD, f"no TLS connection: {exc}", "Check the certificate of the server.")
    text = "HTTP/1.1: with six open streams, a browser blocks all further requests to this origin"
    cure = "Browsers open six connections per origin, across all tabs. Put a proxy with TLS and HTTP/2 in front."
    return Finding(Mark.NOTE, text, cure)


def _offers_http_2(url: str) -> bool:
    """Ask the server with ALPN (RFC 7301). Raises `OSError`."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    if parts.scheme != "https":
        return False
    context = ssl.create_default_context()
    context.set_alpn_protocols(["h2", "http/1.1"])
    with (
        socket.create_connection((parts.hostname, parts.port or 443), timeout=TIMEOUT_S) as plain,
        context.wrap_socket(plain, server_hostname=parts.hostname) as secured,
    ):
        return secured.selected_alpn_protocol() == "h2"


@dataclass
class Arrivals:
    """One reading of the probe stream of /v1/health. Times are Unix seconds."""

    response: httpx.Response
    sent: list[float] = field(default_factory=list)
    """By the clock of the server."""
    arrived: list[float] = field(default_factory=list)
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
            now = time.time()
            for event in parser.feed(data):
                if event.event == "probe":
                    found.sent.append(json.loads(event.data)["sentAt"] / 1000)
                    found.arrived.append(now)
                found.ended = found.ended or event.event == "end"
    return found


def check_stream(http: httpx.Client, url: str) -> Iterator[Finding]:
    try:
        browser, probe, buffered = _read_probes(http, url)
    except (httpx.HTTPError, ValueError, KeyError) as exc:
        cure = "A proxy may close connections early; check its timeouts and its log."
        yield Finding(Mark.BAD, f"the stream broke off: {exc or type(exc).__name__}", cure)
        return
    yield from _check_head(browser.response)
    if (missing := _check_arrival(probe)) is not None:
        yield missing
        return
    if buffered:
        text = f"something buffers the stream: {len(probe.sent)} events arrived at once, {probe.delay_s:.1f} s late"
        cure = "Turn off buffering for this path. In nginx: proxy_buffering off; and no gzip of text/event-stream."
        yield Finding(Mark.BAD, text, cure)
    else:
        yield Finding(Mark.GOOD, f"{len(probe.sent)} events arrived one by one, as they were sent")
    yield check_clock(probe)


def _read_probes(http: httpx.Client, url: str) -> tuple[Arrivals, Arrivals, bool]:
    """Read the stream as a browser would, then in a readable encoding, and return both and whether it is buffered."""
    browser = probe = read_probe(http, url)
    if not probe.sent and _encoding(probe.response) not in READABLE:
        probe = read_probe(http, url, "identity")
    if not probe.bunched:
        return browser, probe, False
    again = read_probe(http, url, probe.response.request.headers["accept-encoding"])  # perhaps this machine was slow
    return browser, again, again.bunched


def _check_arrival(probe: Arrivals) -> Finding | None:
    """What is wrong if the stream did not arrive."""
    status = probe.response.status_code
    if status == 429:
        text = "streaming was not checked: the server has reached its limit of concurrent probes (429)"
        return Finding(Mark.BAD, text, "Try again in a moment.")
    if not probe.sent or not probe.ended:
        text = f"no stream arrives: {status}, {probe.response.headers.get('content-type', 'no content type')}"
        return Finding(Mark.BAD, text, "The server may have an older version, or a proxy responds in its place.")
    return None


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
    skew_s = max(sent - arrived for sent, arrived in zip(found.sent, found.arrived, strict=True))
    if abs(skew_s) < SKEW_S:
        return Finding(Mark.GOOD, "the clocks agree")
    text = f"the server's clock is {abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} this machine's"
    cure = "Tokens created on one machine expire early or late on the other. Synchronize both clocks with NTP."
    return Finding(Mark.BAD if abs(skew_s) >= BAD_SKEW_S else Mark.NOTE, text, cure)
