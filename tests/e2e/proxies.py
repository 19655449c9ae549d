"""Real proxies in front of a real uvicorn: the machine's nginx and Caddy, each with its own folder and ports."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import trustme

from asgi_realtime.testing import Event, EventParser
from tests import processes
from tests.e2e.hosts.servers import GUARD_S, ROOT
from tests.requirements import missing


def wait_for(fact: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + GUARD_S
    while not fact():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=GUARD_S).close()
    except OSError:
        return False
    return True


@contextmanager
def running(command: Sequence[str], port: int, log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command, and wait until it listens on its port. At the end, kill what is left."""
    with processes.running(command, log, cwd=ROOT, env={**os.environ, **environment}) as process:

        def answers_or_ended() -> bool:
            assert process.poll() is None, f"{command[0]} ended"
            return listens(port)

        wait_for(answers_or_ended, f"{command[0]} does not listen")
        yield process


@contextmanager
def app(folder: Path, *options: str, port: int, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "uvicorn", "tests.e2e.proxied_app:app", "--port", str(port), *options]
    with running(command, port, folder / "app.log", **environment) as process:
        yield process


@dataclass(frozen=True)
class Certificate:
    """A certificate for localhost, from an authority that only this test trusts."""

    chain: Path
    key: Path
    trust: ssl.SSLContext

    @classmethod
    def make(cls, folder: Path) -> Certificate:
        authority = trustme.CA()
        issued = authority.issue_cert("localhost", "127.0.0.1")
        chain, key = folder / "chain.pem", folder / "key.pem"
        chain.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(str(key))
        trust = ssl.create_default_context()
        authority.configure_trust(trust)
        return cls(chain, key, trust)


NGINX_AROUND = """
daemon off;
worker_processes 1;
error_log {folder}/error.log info;
pid {folder}/nginx.pid;
events {{ worker_connections 512; }}
http {{
    access_log {folder}/access.log;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    {http}
}}
"""
"""A usual nginx.conf, but with all files in a folder of the test."""


@contextmanager
def nginx(folder: Path, http: str, *, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """The installed nginx with these lines in its `http` block."""
    binary = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if binary is None:
        missing("nginx is not installed (on Debian: apt-get install nginx-light)")
    config = folder / "nginx.conf"
    config.write_text(NGINX_AROUND.format(folder=folder, http=http))
    command = [binary, "-p", str(folder), "-c", str(config), "-e", str(folder / "error.log")]
    with running(command, port, folder / "nginx.log") as process:
        yield process


@contextmanager
def caddy(folder: Path, sites: str, *, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """The installed Caddy with these sites."""
    binary = shutil.which("caddy")
    if binary is None:
        missing("caddy is not installed (on Debian: apt-get install caddy)")
    config = folder / "Caddyfile"
    config.write_text(f"{{\n\tadmin off\n\tauto_https disable_redirects\n}}\n{sites}")
    command = [binary, "run", "--config", str(config), "--adapter", "caddyfile"]
    with running(
        command, port, folder / "caddy.log", XDG_DATA_HOME=str(folder), XDG_CONFIG_HOME=str(folder)
    ) as process:
        yield process


class Visitor:
    """A client of the proxy, at a URL such as `https://localhost:8443`, with a prefix before all paths."""

    def __init__(self, url: str, trust: ssl.SSLContext | bool = True, *, http2: bool = False) -> None:
        self.url = url
        self.http = httpx.Client(verify=trust, http2=http2, timeout=GUARD_S)

    def __enter__(self) -> Visitor:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.http.close()

    def post(self, path: str, **body: Any) -> Any:
        response = self.http.post(self.url + path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def count(self) -> int:
        count: int = self.http.get(f"{self.url}/count").json()["subscribers"]
        return count

    @contextmanager
    def stream(
        self, run: dict[str, str], *, last_event_id: str | None = None, prefix: str = "/realtime", **headers: str
    ) -> Iterator[Stream]:
        """Open the stream of a run as an EventSource does."""
        headers |= {"accept": "text/event-stream", "authorization": f"Bearer {run['token']}"}
        if last_event_id is not None:
            headers["last-event-id"] = last_event_id
        with self.http.stream("GET", f"{self.url}{prefix}/v1/streams/{run['id']}/default", headers=headers) as response:
            yield Stream(response)


class Stream:
    """A live stream."""

    def __init__(self, response: httpx.Response) -> None:
        assert response.status_code == 200, response.status_code
        self.response = response
        self.parser = EventParser()
        self._bodies = response.iter_bytes()
        self._events: list[Event] = []

    def event(self) -> Event:
        while not self._events:
            self._events.extend(self.parser.feed(next(self._bodies)))
        return self._events.pop(0)

    def wait_for_comments(self, count: int) -> None:
        while len(self.parser.comments) < count:
            assert self.parser.feed(next(self._bodies)) == []

    def rest(self) -> list[Event]:
        """All events to the end. Raises `httpx.RemoteProtocolError` if the stream is cut off."""
        for body in self._bodies:
            self._events.extend(self.parser.feed(body))
        return self._events


def check_chunks_arrive_as_they_are_written(visitor: Visitor, **options: str) -> None:
    """Write each chunk after the previous one was read, so a chunk delayed anywhere would block the test."""
    run = visitor.post("/open")
    with visitor.stream(run, **options) as stream:
        for number in range(5):
            chunk = f"{number} {secrets.token_hex(4)}"
            visitor.post("/append", run=run["id"], chunk=chunk)
            assert stream.event().json() == chunk
