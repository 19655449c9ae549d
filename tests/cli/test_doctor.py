"""`doctor` against healthy and unhealthy servers: real ones, behind a real nginx.

A run of the whole command reads the probe stream, which takes almost a second. Tests of the other checks call those.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import trustme

from asgi_realtime.cli import checks, cors_checks, terminal
from tests.cli.command import Command
from tests.client.scripted import ScriptedServer, answer
from tests.e2e import proxies
from tests.e2e.hosts.servers import Serving, serving
from tests.ports import free_port

pytestmark = [pytest.mark.slow, pytest.mark.server]

APP = '''
import time
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route
from asgi_realtime import Realtime

SECRET = "a key for tests, 32 bytes or more"
late = Realtime(secret_key=SECRET, cors=["https://app.example"], clock=lambda: time.time() - 300)
hosted = Starlette(
    routes=[Mount("/r", Realtime(secret_key=SECRET, cors=None))],
    middleware=[Middleware(CORSMiddleware, allow_origins=["https://app.example"])],
)
realtime = Realtime(secret_key=SECRET)


def changed(headers):
    async def app(scope, receive, send):
        async def sent(message):
            if message["type"] == "http.response.start":
                message = {**message, "headers": headers(list(message["headers"]))}
            await send(message)

        await realtime(scope, receive, sent)

    return app


def joined(headers):
    name = b"access-control-allow-origin"
    return [(key, value + b", https://app.example" if key == name else value) for key, value in headers]


def starred(headers):
    return [(key, b"*" if key == b"access-control-expose-headers" else value) for key, value in headers]


async def foreign(request):
    return JSONResponse({"status": "ok"})


async def compressed(scope, receive, send):
    """Like a proxy that only supports Brotli. The body is junk, because no client here could decode Brotli."""
    accepted = dict(scope["headers"])
    if b"br" not in accepted.get(b"accept-encoding", b"") or b"event-stream" not in accepted.get(b"accept", b""):
        return await realtime(scope, receive, send)
    headers = [(b"content-type", b"text/event-stream"), (b"content-encoding", b"br")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"junk"})


more = [
    Mount("/joined", changed(joined)),
    Mount("/twice", changed(lambda headers: [*headers, (b"access-control-allow-origin", b"https://app.example")])),
    Mount("/starred", changed(starred)),
    Mount("/brotli", compressed),
    Route("/foreign/v1/health", foreign),
]
app = Starlette(routes=[*more, Mount("/late", late), Mount("/hosted", hosted), Mount("/realtime", realtime)])
'''


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "doctored.py").write_text(APP)
    with serving("uvicorn", folder, {}, "--app-dir", str(folder), app="doctored:app", cwd=folder) as running:
        yield running


@contextmanager
def nginx(folder: Path, server: str, *, listen: str = "") -> Iterator[str]:
    """A real nginx with these lines in its one server. Yields its host and port."""
    folder.mkdir()
    port = free_port()
    lines = f"server {{ listen 127.0.0.1:{port} {listen}; {server} }}"
    with proxies.nginx(folder, lines, port=port):
        yield f"127.0.0.1:{port}"


def proxy_to(url: str, lines: str = "") -> str:
    return f"location / {{ proxy_pass {url}; proxy_http_version 1.1; {lines} }}"


def test_a_healthy_server(server: Serving, command: Command) -> None:
    done = command("doctor", f"{server.url}/realtime", "--origin", "https://app.example")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines() == [
        "✓ healthy, broker ok",
        "! HTTP/1.1: with six open streams, a browser blocks all further requests to this origin",
        "    Browsers open six connections per origin, across all tabs. Put a proxy with TLS and HTTP/2 in front.",
        "✓ the stream is not compressed",
        "✓ 5 events arrived one by one, as they were sent",
        "✓ the clocks agree",
        "✓ CORS: preflight requests from https://app.example are allowed",
        "✓ CORS: pages from https://app.example can read responses",
        "✓ CORS: all headers that clients read are exposed",
    ]


def test_a_proxy_that_honors_our_headers_does_not_buffer(server: Serving, command: Command, tmp_path: Path) -> None:
    with nginx(tmp_path / "nginx", proxy_to(server.url, "proxy_buffering on; gzip on; gzip_proxied any;")) as address:
        done = command("doctor", f"http://{address}/realtime")
    assert done.code == 0
    assert "arrived one by one" in done.out and "not compressed" in done.out


def test_a_buffering_proxy_is_found(server: Serving, command: Command, tmp_path: Path) -> None:
    lines = "proxy_ignore_headers X-Accel-Buffering; gzip on; gzip_proxied any; gzip_min_length 0; gzip_types *;"
    with nginx(tmp_path / "nginx", proxy_to(server.url, lines)) as address:
        done = command("doctor", f"http://{address}/realtime")
    assert done.code == 1
    assert "✗ something buffers the stream: 5 events arrived at once" in done.out
    assert "In nginx: proxy_buffering off" in done.out


def test_a_compressing_proxy_is_found(server: Serving, command: Command, tmp_path: Path) -> None:
    lines = "gzip on; gzip_proxied any; gzip_min_length 0; gzip_types text/event-stream;"
    with nginx(tmp_path / "nginx", proxy_to(server.url, lines)) as address:
        done = command("doctor", f"http://{address}/realtime")
    assert "! the stream is compressed (gzip)" in done.out


def test_a_proxy_that_cuts_streams_is_found(server: Serving, command: Command, tmp_path: Path) -> None:
    with nginx(tmp_path / "nginx", proxy_to(server.url, "proxy_read_timeout 100ms;")) as address:
        done = command("doctor", f"http://{address}/realtime")
    assert done.code == 1
    assert "✗ the stream broke off" in done.out


def test_http_2_and_an_untrusted_certificate_are_found(
    server: Serving, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = trustme.CA()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "cert.pem"))
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    certificate = f"ssl_certificate {tmp_path}/cert.pem; ssl_certificate_key {tmp_path}/cert.pem;"
    with nginx(tmp_path / "nginx", certificate + proxy_to(server.url), listen="ssl http2") as address:
        done = command("doctor", f"https://{address}/realtime")
        assert done.code == 1 and "cannot be reached" in done.out and "Serve the whole chain" in done.out
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        done = command("doctor", f"https://{address}/realtime")
        assert "✓ HTTP/2: many streams share one connection" in done.out


def test_a_wrong_clock_is_found(server: Serving, command: Command) -> None:
    done = command("doctor", f"{server.url}/late")
    assert done.code == 1
    assert "✗ the server's clock is 300 s behind this machine's" in done.out


# CORS


def cors(server: Serving, path: str, origin: str = "https://app.example") -> list[str]:
    """The CORS findings, each with its sign and its cure."""
    with checks.make_http() as http:
        findings = list(cors_checks.check_cors(http, server.url + path, origin))
    return [f"{finding.mark.value[0]} {finding.text} {finding.cure}" for finding in findings]


def test_a_page_that_cannot_read_is_found(server: Serving) -> None:
    preflight, response, _ = cors(server, "/late", "https://other.example")
    assert "✗ CORS: preflight requests from https://other.example are rejected: the origin is not allowed" in preflight
    assert "✗ CORS: pages from https://other.example cannot read responses" in response


def test_the_cors_middleware_of_the_host_is_checked(server: Serving) -> None:
    preflight, _, exposed = cors(server, "/hosted/r")
    assert preflight.startswith("✗")
    assert "not allowed: authorization, last-event-id, trigger-version" in preflight
    assert "! CORS: pages cannot see electric-handle" in exposed


@pytest.mark.parametrize("path", ["/joined", "/twice"])
def test_two_layers_of_cors_are_found(server: Serving, path: str) -> None:
    """The cure suggested to allow the origin, which was allowed twice already."""
    preflight, response, _ = cors(server, path)
    assert "✗ CORS: a preflight has 2 values of access-control-allow-origin" in preflight
    assert "✗ CORS: a response has 2 values of access-control-allow-origin" in response
    assert "Realtime(cors=[" not in preflight + response


def test_a_star_exposes_all_headers(server: Serving) -> None:
    assert cors(server, "/starred")[-1].startswith("✓ CORS: all headers that clients read are exposed")


# Wrong URLs and servers


@pytest.mark.parametrize("path", ["", "/hosted", "/foreign", "/realtime/v1/"])
def test_a_wrong_path_is_reported(server: Serving, command: Command, path: str) -> None:
    done = command("doctor", server.url + path)
    assert done.code == 1 and "no Realtime responds at" in done.out
    assert len(done.out.splitlines()) == 2


def test_a_redirect_is_reported(server: Serving, command: Command, tmp_path: Path) -> None:
    with nginx(
        tmp_path / "nginx", proxy_to(server.url, "return 301 https://elsewhere.example$request_uri;")
    ) as address:
        done = command("doctor", f"http://{address}/realtime")
    assert done.code == 1
    assert "redirects to https://elsewhere.example/realtime/v1/health" in done.out


def test_a_server_cannot_control_the_terminal(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "_is_terminal", lambda stream: True)
    health = b'{"status":"ok","broker":"\\u001b]0;x\\u0007","warnings":["\\u001b[2J"]}'
    with ScriptedServer(answer(200, health)) as server:
        out = command("doctor", server.origin).out
    assert "\x1b" not in out
    assert "broker \N{REPLACEMENT CHARACTER}]0;x" in out


@pytest.mark.parametrize(
    ("status", "cure"),
    [("closing", "It is shutting down; try again."), ("unavailable", "Check the log of the server.")],
)
def test_an_unhealthy_server_is_reported(command: Command, status: str, cure: str) -> None:
    health = f'{{"status":"{status}","broker":"{status}"}}'.encode()
    with ScriptedServer(answer(503, health), answer(429)) as server:
        done = command("doctor", server.origin)
    assert done.code == 1
    assert f"✗ not healthy: {status}, broker {status}\n    {cure}\n" in done.out


def test_a_server_at_its_limit_of_probes_is_reported(command: Command) -> None:
    health = answer(200, b'{"status":"ok","broker":"memory"}')
    with ScriptedServer(health, answer(429)) as server:
        done = command("doctor", server.origin)
    assert done.code == 1
    assert "the server has reached its limit of concurrent probes" in done.out
    assert "a proxy responds in its place" not in done.out


def test_an_unreachable_server_is_reported(command: Command) -> None:
    done = command("doctor", f"http://127.0.0.1:{free_port()}/realtime")
    assert done.code == 1 and "cannot be reached" in done.out


@pytest.mark.parametrize(
    "url",
    ["http://[::1/realtime", "http://a:99999/realtime", "realtime", "ftp://a/realtime", "http://a/?x=1", "http://a/?"],
)
def test_wrong_usage_is_reported(command: Command, url: str) -> None:
    done = command("doctor", url)
    assert done.code == 2
    assert "the origin and the mount path" in done.err or "is not a URL" in done.err


@pytest.mark.parametrize("url", ["http://\N{PILE OF POO}.example", "http://xn--a.example", "http://a/\nb"])
def test_a_url_that_only_httpx_rejects_is_reported(command: Command, url: str) -> None:
    done = command("doctor", url)
    assert done.code == 2 and "is not a URL" in done.err


def test_an_origin_that_no_browser_sends_is_rejected(command: Command) -> None:
    done = command("doctor", "http://127.0.0.1/realtime", "--origin", "app.example")
    assert done.code == 2 and "cors origin 'app.example'" in done.err


def test_a_compression_that_only_browsers_decode_is_found(server: Serving, command: Command) -> None:
    done = command("doctor", f"{server.url}/brotli")
    assert done.code == 0
    assert "! the stream is compressed (br)" in done.out and "arrived one by one" in done.out


def test_a_terminal_without_unicode_gets_words_for_signs() -> None:
    health = answer(200, b'{"status":"unavailable","broker":"unavailable"}')
    with ScriptedServer(health, answer(429)) as server:
        command = [sys.executable, "-m", "asgi_realtime", "doctor", server.origin]
        environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("BAD not healthy: unavailable, broker unavailable\n")
    assert "\nNOTE HTTP/1.1: " in done.stdout


def test_events_that_arrive_apart_are_not_bunched() -> None:
    response = httpx.Response(200)
    assert checks.Arrivals(response, sent=[0, 0.8], arrived=[5, 5.1]).bunched
    assert not checks.Arrivals(response, sent=[0, 0.8], arrived=[5, 5.7]).bunched
    assert not checks.Arrivals(response, sent=[0], arrived=[5]).bunched
