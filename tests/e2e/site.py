"""The server that the Node programs and the Python clients talk to: the app of `clients_app` under uvicorn."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from asgi_realtime import Realtime
from tests.ports import free_port

ROOT = Path(__file__).parent.parent.parent
SECRET = "secret-key-of-the-tests-with-32-bytes-or-more"
STREAM_BYTES = 64 * 1024
"""How much of a stream the server retains."""

GUARD_S = 60.0
"""Nothing waits longer than this. It is no measure of speed: the machine may be busy."""

Line = dict[str, Any]


@dataclass
class Opened:
    """A run of the host's own code, open until `end`, and a token that reads it."""

    site: Site
    id: str
    token: str

    def append(self, *chunks: Any, stream: str = "default") -> None:
        self.site.post("append", run=self.id, chunks=chunks, stream=stream)

    def update(self, **changes: Any) -> None:
        self.site.post("update", run=self.id, **changes)

    def end(self, **how: Any) -> None:
        self.site.post("end", run=self.id, **how)


@dataclass
class Site:
    """The app of `clients_app` under a real uvicorn, on a port that survives a restart."""

    broker: str
    poll_s: float = 4 * GUARD_S
    """How long the server holds a poll: by default longer than any test waits."""
    app: str = "tests.e2e.clients_app:app"
    environment: dict[str, str] = field(default_factory=dict)
    prefix: str = field(default_factory=lambda: f"t{secrets.token_hex(6)}")
    port: int = field(default_factory=free_port)
    http: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=GUARD_S))
    tokens: Realtime = field(default_factory=lambda: Realtime(secret_key=SECRET))
    """Creates tokens without a server, as another process of the host can."""
    ahead_s: int = 0
    """How far the clock of the server is ahead of the system clock."""
    _process: subprocess.Popen[bytes] | None = None

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def base_url(self) -> str:
        """The usual setting: all paths of a client are inside the mount."""
        return f"{self.origin}/realtime"

    @property
    def _settings(self) -> dict[str, str]:
        where = {"BROKER": self.broker, "PREFIX": self.prefix}
        return {**where, "SECRET": SECRET, "POLL": str(self.poll_s), "STREAM_BYTES": str(STREAM_BYTES)}

    def start(self) -> None:
        self.launch()
        self.until_ready()

    def launch(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", self.app, "--port", str(self.port)],
            cwd=ROOT,
            env={**os.environ, **self._settings, **self.environment},
            stdout=subprocess.DEVNULL,  # the access log; a failed test shows stderr
        )

    def until_ready(self) -> None:
        self.until(self._answers, "the server answers")

    def _answers(self) -> bool:
        assert self._process is not None and self._process.poll() is None, "the server ended"
        try:
            return self.http.get(f"{self.base_url}/v1/health").status_code == 200
        except httpx.TransportError:
            return False

    def ensure_running(self) -> None:
        """Start it again if a failed test left it stopped."""
        if self._process is None:
            self.start()

    def stop(self) -> None:
        """Stop it with SIGTERM, as a deployment does."""
        assert self._process is not None
        self.http.close()  # uvicorn must not wait for our idle connections
        self.http = httpx.Client(timeout=GUARD_S)
        self._process.send_signal(signal.SIGTERM)
        assert self._process.wait(GUARD_S) in (0, -signal.SIGTERM)  # uvicorn raises it again after closing
        self._process = None

    def crash(self) -> None:
        """Kill it without a shutdown."""
        self.kill()
        self.http = httpx.Client(timeout=GUARD_S)

    def restart(self) -> None:
        self.stop()
        self.start()

    def kill(self) -> None:
        self.http.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def post(self, action: str, **body: Any) -> Any:
        answer = self.http.post(f"{self.origin}/host/{action}", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def open(self, **options: Any) -> Opened:
        return Opened(self, **self.post("open", **{"name": "opened", **options}))

    def trigger(self, task: str, payload: Any = None, **options: Any) -> Opened:
        handle = self.post("trigger", task=task, payload=payload, **options)
        return Opened(self, handle["id"], handle["publicAccessToken"])

    def send(self, run: str, input: str, data: Any) -> None:
        self.post("input", run=run, input=input, data=data)

    def token(self, *scopes: str, expires_in: str = "15m") -> str:
        return self.tokens.create_public_token(scopes=scopes, expires_in=expires_in)

    def move_clock(self, seconds: int) -> None:
        self.ahead_s += seconds
        self.post("set_ahead", seconds=self.ahead_s)

    def requests(self, part: str = "", *, query: str = "") -> list[Line]:
        """The requests to the mounted app so far."""
        seen = self.http.get(f"{self.origin}/host/requests").json()
        return [request for request in seen if part in request["path"] and query in request["query"]]

    def until_asked(self, part: str, *, query: str = "", times: int = 1, open: bool = False) -> list[Line]:
        """Wait until there were so many requests; with `open`, only those that are not answered yet."""

        def asked() -> list[Line]:
            found = [request for request in self.requests(part, query=query) if request["open"] or not open]
            return found if len(found) >= times else []

        found: list[Line] = self.until(asked, f"{times} requests for {part}?{query}")
        return found

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + GUARD_S
        while not (found := condition()):
            assert time.monotonic() < deadline, f"after {GUARD_S:g} s still false: {what}; requests: {self._seen()}"
            time.sleep(0.01)
        return found

    def _seen(self) -> Any:
        try:
            return self.requests()
        except httpx.TransportError as exc:
            return exc


@contextmanager
def serving(broker: str, **options: Any) -> Iterator[Site]:
    site = Site(broker, **options)
    with starting(site):
        yield site


@contextmanager
def starting(*sites: Site) -> Iterator[None]:
    try:
        for site in sites:
            site.launch()
        for site in sites:
            site.until_ready()
        yield
    finally:
        for site in sites:
            site.kill()
