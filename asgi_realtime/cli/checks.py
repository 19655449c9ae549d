"""What `doctor` looks at, one check after the other. Needs httpx, which the extra `client` brings."""

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
EVENT_STREAM = {"accept": "text/event-stream"}
ENCODINGS = "gzip, deflate, br, zstd"
"""What browsers take."""

BUNCHED = 0.5
"""A stream is held back if its events arrive within less than this part of the time in which they were sent."""

SKEW_S, BAD_SKEW_S = 5.0, 60.0

REQUEST_HEADERS = ("authorization", "last-event-id", "trigger-version")
"""What clients of other origins send that a preflight has to allow."""


def examine(url: str, origin: str | None) -> Iterator[Finding]:
    """All findings, in an order in which each makes sense after the ones before."""
    with httpx.Client(timeout=TIMEOUT_S, follow_redirects=False, verify=ssl.create_default_context()) as http:
        yield from check_health(http, url)
        yield check_version(url)
        yield from check_stream(http, url)
        if origin is not None:
            yield from check_cors(http, url, origin)


def check_health(http: httpx.Client, url: str) -> Iterator[Finding]:
    try:
        answer = http.get(f"{url}/v1/health")
    except (httpx.InvalidURL, UnicodeError) as exc:
        raise UsageError(f"{url!r} is no URL: {exc}") from None
    except httpx.HTTPError as exc:
        yield Finding(Mark.BAD, f"{url} cannot be reached: {exc or type(exc).__name__}", _cure_of(exc), ends=True)
        return
    if answer.is_redirect:
        cure = "Use the address that it leads to: an EventSource of another origin does not follow."
        text = f"{url} is redirected to {answer.headers.get('location', 'nowhere')}"
        yield Finding(Mark.BAD, text, cure, ends=True)
        return
    try:
        told = answer.json()
        status, broker = told["status"], told["broker"]
    except (ValueError, TypeError, KeyError):
        cure = "URL is the origin and the path of the mount. A page of HTML comes from a proxy or from the host app."
        text = f"no Realtime answers at {url}: /v1/health gives {answer.status_code}"
        yield Finding(Mark.BAD, text, cure, ends=True)
        return
    if status == "ok":
        yield Finding(Mark.GOOD, f"healthy, broker {broker}")
    else:
        cure = {"closing": "It is shutting down; ask again."}.get(status, "Look into the server's log.")
        yield Finding(Mark.BAD, f"not healthy: {status}, broker {broker}", cure)
    for warning in told.get("warnings", []):
        yield Finding(Mark.NOTE, warning)


def _cure_of(error: httpx.HTTPError) -> str:
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return (
            "Browsers refuse it too, unless they know who signed it. Serve the whole chain, for this name; for a CA of"
            " your own set SSL_CERT_FILE."
        )
    return "Is the server up, is the port right, does a firewall let it pass?"


def check_version(url: str) -> Finding:
    """Which HTTP a browser would speak: it takes version 2 over TLS only, where the server offers it (RFC 7301)."""
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
            return Finding(Mark.BAD, f"no TLS connection: {exc}", "Look at the certificate of the server.")
    cure = "A browser opens six connections to an origin, in all its tabs. Put a proxy with TLS and HTTP/2 in front."
    return Finding(Mark.NOTE, "HTTP/1.1: a seventh open stream of a browser waits for one of the others", cure)


@dataclass
class Arrivals:
    """One reading of the stream that /v1/health gives."""

    response: httpx.Response
    sent: list[float] = field(default_factory=list)
    """Seconds, by the server's clock."""
    arrived: list[float] = field(default_factory=list)
    """Seconds, by a clock that is never set."""
    wall: list[float] = field(default_factory=list)
    """Seconds, by this machine's clock."""
    ended: bool = False

    @property
    def bunched(self) -> bool:
        return len(self.sent) > 1 and self._spread(self.arrived) < BUNCHED * self._spread(self.sent)

    @property
    def held_s(self) -> float:
        return max(0.0, self._spread(self.sent) - self._spread(self.arrived))

    @staticmethod
    def _spread(times: list[float]) -> float:
        return times[-1] - times[0]


def read_probe(http: httpx.Client, url: str, encodings: str = ENCODINGS) -> Arrivals:
    """Raises `httpx.HTTPError`."""
    headers = {**EVENT_STREAM, "accept-encoding": encodings}
    with http.stream("GET", f"{url}/v1/health", headers=headers) as response:
        found, parser = Arrivals(response), EventParser()
        if response.status_code != 200 or encoding_of(response) not in READABLE:
            return found
        for data in response.iter_bytes():
            at, wall = time.monotonic(), time.time()
            for event in parser.feed(data):
                if event.event == "probe":
                    found.sent.append(json.loads(event.data)["sentAt"] / 1000)
                    found.arrived.append(at)
                    found.wall.append(wall)
                found.ended = found.ended or event.event == "end"
    return found


def check_stream(http: httpx.Client, url: str) -> Iterator[Finding]:
    try:
        head = first = read_probe(http, url)
        if not first.sent and encoding_of(first.response) not in READABLE:
            first = read_probe(http, url, "identity")
        found = (
            read_probe(http, url, first.response.request.headers["accept-encoding"]) if first.bunched else first
        )  # once may be this machine's own slowness
    except (httpx.HTTPError, ValueError, KeyError) as exc:
        cure = "A proxy may end a connection early; look at its time-outs and its log."
        yield Finding(Mark.BAD, f"a stream broke off: {exc or type(exc).__name__}", cure)
        return
    yield from _check_head(head.response)
    if found.response.status_code == 429:
        text = "no stream could be looked at (429): the server's limit of probes is reached"
        yield Finding(Mark.BAD, text, "Others ask it too: try again in a moment.")
        return
    if not found.sent or not found.ended:
        text = f"no stream comes: {found.response.status_code}, {found.response.headers.get('content-type', 'no type')}"
        yield Finding(Mark.BAD, text, "The server may be of an older version, or a proxy answers in its place.")
        return
    if first.bunched and found.bunched:
        text = f"the stream is held back on its way: {len(found.sent)} events came at once, {found.held_s:.1f} s late"
        cure = "Switch buffering off for this path. nginx: proxy_buffering off; and no gzip of text/event-stream."
        yield Finding(Mark.BAD, text, cure)
    else:
        yield Finding(Mark.GOOD, f"{len(found.sent)} events of a stream came one by one, as they were sent")
    yield check_clock(found)


def encoding_of(response: httpx.Response) -> str:
    encoding: str = response.headers.get("content-encoding", "identity")
    return encoding.strip().lower()


READABLE = frozenset({"identity", "gzip", "deflate"})
"""What can be read without further packages; of other encodings it is enough to know that they are there."""


def _check_head(response: httpx.Response) -> Iterator[Finding]:
    encoding = encoding_of(response)
    if encoding != "identity":
        cure = (
            "Leave text/event-stream out of the compression of the proxy or the host: each event costs CPU and memory."
        )
        yield Finding(Mark.NOTE, f"the stream is compressed ({encoding})", cure)
    elif response.status_code == 200:
        yield Finding(Mark.GOOD, "the stream is not compressed")
    if "no-transform" not in response.headers.get("cache-control", "") and response.status_code == 200:
        cure = "Let the header pass as the server sends it, or caches on the way may change the stream."
        yield Finding(Mark.NOTE, "cache-control has lost its no-transform", cure)


def check_clock(found: Arrivals) -> Finding:
    """What arrives was sent a moment earlier; by more than that, or later, only a clock can tell."""
    ahead_s = [sent - wall for sent, wall in zip(found.sent, found.wall, strict=True)]
    skew_s = max(ahead_s)
    text = f"the server's clock is {abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} this machine's"
    if abs(skew_s) < SKEW_S:
        return Finding(Mark.GOOD, "clocks agree")
    cure = "Tokens that one machine makes expire early or late on the other. Set both clocks with NTP."
    return Finding(Mark.BAD if abs(skew_s) >= BAD_SKEW_S else Mark.NOTE, text, cure)


def check_cors(http: httpx.Client, url: str, origin: str) -> Iterator[Finding]:
    asked = {
        "origin": origin,
        "access-control-request-method": "GET",
        "access-control-request-headers": ",".join(sorted(REQUEST_HEADERS)),
    }
    try:
        preflight = http.options(f"{url}/v1/runs/run_1", headers=asked)
        answer = http.get(f"{url}/v1/health", headers={"origin": origin})
    except httpx.HTTPError as exc:
        yield Finding(Mark.BAD, f"CORS cannot be looked at: {exc or type(exc).__name__}")
        return
    yield _check_preflight(preflight, origin)
    yield from _check_answer(answer, origin)


def _check_preflight(preflight: httpx.Response, origin: str) -> Finding:
    if len(_origins(preflight)) > 1:
        return _too_many_origins(preflight, "a preflight")
    wrong = [] if preflight.is_success else [f"status {preflight.status_code}"]
    if not _admits(preflight, origin):
        wrong.append("the origin is not allowed")
    allowed = _names(preflight, "access-control-allow-headers")
    # "*" does not stand for authorization: Fetch, section 4.8.
    missing = [
        name for name in REQUEST_HEADERS if name not in allowed and ("*" not in allowed or name == "authorization")
    ]
    if missing:
        wrong.append(f"not allowed: {', '.join(missing)}")
    if not wrong:
        return Finding(Mark.GOOD, f"CORS: a preflight of {origin} is admitted")
    cure = f"Realtime(cors=[{origin!r}]), or allow_headers=['*', 'authorization'] in the host's own CORS middleware."
    return Finding(Mark.BAD, f"CORS: a preflight of {origin} is refused: {'; '.join(wrong)}", cure)


def _check_answer(answer: httpx.Response, origin: str) -> Iterator[Finding]:
    if len(_origins(answer)) > 1:
        yield _too_many_origins(answer, "an answer")
    elif not _admits(answer, origin):
        yield Finding(Mark.BAD, f"CORS: pages of {origin} may not read", f"Realtime(cors=[{origin!r}])")
    else:
        yield Finding(Mark.GOOD, f"CORS: pages of {origin} may read")
    exposed = _names(answer, "access-control-expose-headers")
    missing = [name for name in EXPOSED_HEADERS if name not in exposed]
    if missing and "*" not in exposed:  # it stands for all where no credentials are used: Fetch, section 3.3.3
        cure = "expose_headers=asgi_realtime.EXPOSED_HEADERS in the host's own CORS middleware."
        text = f"CORS: pages do not see {', '.join(missing)}, which the clients of Trigger.dev read"
        yield Finding(Mark.NOTE, text, cure)
    else:
        yield Finding(Mark.GOOD, "CORS: all headers that clients read are exposed")


def _origins(response: httpx.Response) -> list[str]:
    """One after the other in one line counts as often as several lines."""
    return response.headers.get_list("access-control-allow-origin", split_commas=True)


def _too_many_origins(response: httpx.Response, what: str) -> Finding:
    cure = "The proxy or the host adds CORS headers too. Let one of them do it: Realtime(cors=None) leaves it to them."
    text = f"CORS: {what} has {len(_origins(response))} values of access-control-allow-origin"
    return Finding(Mark.BAD, text, cure)


def _admits(response: httpx.Response, origin: str) -> bool:
    return response.headers.get("access-control-allow-origin") in ("*", origin)


def _names(response: httpx.Response, header: str) -> set[str]:
    return {name.strip().lower() for name in response.headers.get(header, "").split(",")}
