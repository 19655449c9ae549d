"""`doctor` at servers that are well, and at such that are not: real ones, with a real nginx between."""

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

from asgi_realtime.cli import checks, terminal
from tests.cli.command import Command
from tests.client.scripted import ScriptedServer, answer
from tests.e2e import proxies
from tests.e2e.hosts.servers import Serving, serving
from tests.ports import free_port

pytestmark = [pytest.mark.slow, pytest.mark.server, pytest.mark.timeout(60)]

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
    """As a proxy that can do Brotli only. What it sends is none, and nobody here could read it."""
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
    (folder / "patient.py").write_text(APP)
    with serving("uvicorn", folder, {}, "--app-dir", str(folder), app="patient:app", cwd=folder) as running:
        yield running


@contextmanager
def nginx(folder: Path, server: str, *, listen: str = "") -> Iterator[str]:
    """A real nginx with this in its one server. Gives its host and port."""
    folder.mkdir()
    port = free_port()
    lines = f"server {{ listen 127.0.0.1:{port} {listen}; {server} }}"
    with proxies.nginx(folder, lines, port=port):
        yield f"127.0.0.1:{port}"


def passing_on_to(url: str, lines: str = "") -> str:
    return f"location / {{ proxy_pass {url}; proxy_http_version 1.1; {lines} }}"


def test_a_server_that_is_well(server: Serving, command: Command) -> None:
    done = command("doctor", f"{server.url}/realtime", "--origin", "https://app.example")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines() == [
        "✓ healthy, broker ok",
        "! HTTP/1.1: a seventh open stream of a browser waits for one of the others",
        "    A browser opens six connections to an origin, in all its tabs. Put a proxy with TLS and HTTP/2 in front.",
        "✓ the stream is not compressed",
        "✓ 5 events of a stream came one by one, as they were sent",
        "✓ clocks agree",
        "✓ CORS: a preflight of https://app.example is admitted",
        "✓ CORS: pages of https://app.example may read",
        "✓ CORS: all headers that clients read are exposed",
    ]


def test_a_proxy_that_heeds_us_holds_nothing_back(server: Serving, command: Command, tmp_path: Path) -> None:
    with nginx(
        tmp_path / "nginx", passing_on_to(server.url, "proxy_buffering on; gzip on; gzip_proxied any;")
    ) as address:
        done = command("doctor", f"http://{address}/realtime")
    assert done.code == 0
    assert "came one by one" in done.out and "not compressed" in done.out


def test_a_proxy_that_collects_is_found(server: Serving, command: Command, tmp_path: Path) -> None:
    lines = "proxy_ignore_headers X-Accel-Buffering; gzip on; gzip_proxied any; gzip_min_length 0; gzip_types *;"
    with nginx(tmp_path / "nginx", passing_on_to(server.url, lines)) as address:
        done = command("doctor", f"http://{address}/realtime")
    assert done.code == 1
    assert "✗ the stream is held back on its way: 5 events came at once" in done.out
    assert "nginx: proxy_buffering off" in done.out


def test_a_proxy_that_compresses_streams_is_found(server: Serving, command: Command, tmp_path: Path) -> None:
    lines = "gzip on; gzip_proxied any; gzip_min_length 0; gzip_types text/event-stream;"
    with nginx(tmp_path / "nginx", passing_on_to(server.url, lines)) as address:
        done = command("doctor", f"http://{address}/realtime")
    assert "! the stream is compressed (gzip)" in done.out


def test_a_proxy_that_cuts_is_found(server: Serving, command: Command, tmp_path: Path) -> None:
    with nginx(tmp_path / "nginx", passing_on_to(server.url, "proxy_read_timeout 100ms;")) as address:
        done = command("doctor", f"http://{address}/realtime")
    assert done.code == 1
    assert "✗ a stream broke off" in done.out


def test_http_2_is_found_and_a_certificate_that_nobody_trusts(
    server: Serving, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = trustme.CA()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "cert.pem"))
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    certificate = f"ssl_certificate {tmp_path}/cert.pem; ssl_certificate_key {tmp_path}/cert.pem;"
    with nginx(tmp_path / "nginx", certificate + passing_on_to(server.url), listen="ssl http2") as address:
        done = command("doctor", f"https://{address}/realtime")
        assert done.code == 1 and "cannot be reached" in done.out and "Serve the whole chain" in done.out
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        done = command("doctor", f"https://{address}/realtime")
        assert "✓ HTTP/2: many streams share one connection" in done.out


def test_a_clock_that_is_wrong_is_found(server: Serving, command: Command) -> None:
    done = command("doctor", f"{server.url}/late")
    assert done.code == 1
    assert "✗ the server's clock is 300 s behind this machine's" in done.out


def test_a_page_that_may_not_read_is_told(server: Serving, command: Command) -> None:
    done = command("doctor", f"{server.url}/late", "--origin", "https://other.example")
    assert "✗ CORS: a preflight of https://other.example is refused: the origin is not allowed" in done.out
    assert "✗ CORS: pages of https://other.example may not read" in done.out


def test_the_hosts_own_cors_is_looked_at(server: Serving, command: Command) -> None:
    done = command("doctor", f"{server.url}/hosted/r", "--origin", "https://app.example")
    assert done.code == 1
    assert "not allowed: authorization, last-event-id, trigger-version" in done.out
    assert "! CORS: pages do not see electric-handle" in done.out


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("", "no Realtime answers at"),
        ("/hosted", "no Realtime answers at"),
        ("/foreign", "no Realtime answers at"),
        ("/realtime/v1/", "no Realtime answers at"),
    ],
)
def test_a_wrong_path_is_told(server: Serving, command: Command, path: str, told: str) -> None:
    done = command("doctor", server.url + path)
    assert done.code == 1 and told in done.out
    assert len(done.out.splitlines()) == 2


def test_a_redirect_is_told(server: Serving, command: Command, tmp_path: Path) -> None:
    with nginx(
        tmp_path / "nginx", passing_on_to(server.url, "return 301 https://elsewhere.example$request_uri;")
    ) as address:
        done = command("doctor", f"http://{address}/realtime")
    assert done.code == 1
    assert "is redirected to https://elsewhere.example/realtime/v1/health" in done.out


def test_a_terminal_does_not_obey_what_a_server_says(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "_is_terminal", lambda stream: True)
    health = b'{"status":"ok","broker":"\\u001b]0;x\\u0007","warnings":["\\u001b[2J"]}'
    with ScriptedServer(answer(200, health)) as told:
        out = command("doctor", told.origin).out
    assert "\x1b" not in out
    assert "broker \N{REPLACEMENT CHARACTER}]0;x" in out


def test_a_server_whose_probes_are_all_taken_is_told(command: Command) -> None:
    health = answer(200, b'{"status":"ok","broker":"memory"}')
    with ScriptedServer(health, answer(429)) as told:
        done = command("doctor", told.origin)
    assert done.code == 1
    assert "the server's limit of probes is reached" in done.out
    assert "a proxy answers in its place" not in done.out


def test_a_server_that_is_not_there(command: Command) -> None:
    done = command("doctor", f"http://127.0.0.1:{free_port()}/realtime")
    assert done.code == 1 and "cannot be reached" in done.out


@pytest.mark.parametrize(
    "url",
    ["http://[::1/realtime", "http://a:99999/realtime", "realtime", "ftp://a/realtime", "http://a/?x=1", "http://a/?"],
)
def test_wrong_use(command: Command, url: str) -> None:
    done = command("doctor", url)
    assert done.code == 2 and "where the Realtime is mounted" in done.err


@pytest.mark.parametrize("url", ["http://\N{PILE OF POO}.example", "http://xn--a.example", "http://a/\nb"])
def test_what_only_httpx_takes_for_no_url_is_told(command: Command, url: str) -> None:
    done = command("doctor", url)
    assert done.code == 2 and "is no URL" in done.err


def test_an_origin_that_no_browser_sends_is_refused(command: Command) -> None:
    done = command("doctor", "http://127.0.0.1/realtime", "--origin", "app.example")
    assert done.code == 2 and "cors origin 'app.example'" in done.err


@pytest.mark.parametrize("path", ["/joined", "/twice"])
def test_two_layers_of_cors_are_found(server: Serving, command: Command, path: str) -> None:
    """The cure named the origin, which is allowed twice already."""
    done = command("doctor", server.url + path, "--origin", "https://app.example")
    assert done.code == 1
    assert "✗ CORS: a preflight has 2 values of access-control-allow-origin" in done.out
    assert "✗ CORS: an answer has 2 values of access-control-allow-origin" in done.out
    assert "Realtime(cors=[" not in done.out


def test_a_star_exposes_all_headers(server: Serving, command: Command) -> None:
    done = command("doctor", f"{server.url}/starred", "--origin", "https://app.example")
    assert done.code == 0 and "✓ CORS: all headers that clients read are exposed" in done.out


def test_a_compression_that_only_browsers_read_is_found(server: Serving, command: Command) -> None:
    done = command("doctor", f"{server.url}/brotli")
    assert done.code == 0
    assert "! the stream is compressed (br)" in done.out and "came one by one" in done.out


def test_a_terminal_without_unicode_is_told_in_words(server: Serving) -> None:
    command = [sys.executable, "-m", "asgi_realtime", "doctor", f"{server.url}/realtime"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("GOOD healthy, broker ok\nNOTE HTTP/1.1: ")


def test_events_that_came_apart_are_not_bunched() -> None:
    response = httpx.Response(200)
    assert checks.Arrivals(response, sent=[0, 0.8], arrived=[5, 5.1]).bunched
    assert not checks.Arrivals(response, sent=[0, 0.8], arrived=[5, 5.7]).bunched
    assert not checks.Arrivals(response, sent=[0], arrived=[5]).bunched


def test_the_module_is_a_command() -> None:
    done = subprocess.run([sys.executable, "-m", "asgi_realtime", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "doctor" in done.stdout
