"""What the end-to-end tests need: Chromium, the language model, and the examples in separate processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from examples.local_model import Model, ModelMissing, find_model, serving
from tests.chromium import GUARD_S as GUARD_S
from tests.chromium import launched
from tests.e2e import node
from tests.e2e.fake_model import FakeModel, fake_model
from tests.e2e.site import Site
from tests.e2e.site import serving as serving_site
from tests.requirements import missing, node_binary, npm_packages

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Server:
    """A running example."""

    process: subprocess.Popen[str]
    url: str

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


class Relay:
    """Forwards bytes to a server and back. `cut` breaks every open connection."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Relay:
        self._spawn(self._accept)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join()

    def cut(self) -> None:
        for end in list(self._sockets):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _spawn(self, target: Callable[..., None], *args: socket.socket) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                browser, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._port))
                self._sockets |= {browser, server}
                self._spawn(self._carry, browser, server)
                self._spawn(self._carry, server, browser)

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with source, suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        self._sockets.discard(source)
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)


def start_uvicorn(
    app: str, *, port: int = 0, folder: Path = ROOT, environment: Mapping[str, str] | None = None
) -> tuple[subprocess.Popen[bytes], int]:
    """Start uvicorn, and return its process and port. The port listens already, so early requests wait."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen()
        process = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", app, "--fd", str(listener.fileno())],
            cwd=folder,
            env={**os.environ, **(environment or {})},
            pass_fds=[listener.fileno()],
            stderr=subprocess.DEVNULL,
        )
        found: int = listener.getsockname()[1]
    return process, found


# At most module scope: Playwright's sync API leaves its event loop running, and other tests start their own.
@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with launched() as browser:
        yield browser


@pytest.fixture(scope="session")
def model_path() -> Path:
    try:
        return find_model()
    except ModelMissing as exc:
        missing(str(exc))


@pytest.fixture(scope="session")
def model(model_path: Path) -> Iterator[Model]:
    """One real model for all tests that do not start or stop it. Its answers are short, to save time."""
    with serving(model_path, api_key="for the tests only", answer_tokens=150) as running:
        yield running


@pytest.fixture(scope="session")
def fake() -> Iterator[FakeModel]:
    """A fake model with the answer of the test, which stops in the middle of it while held."""
    with fake_model() as running:
        yield running


@contextmanager
def example(name: str, environment: dict[str, str], *, package: str = "examples") -> Iterator[Server]:
    """Run an example as a user does, on a free port. Removes the user's own model endpoint."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("OPENAI_")}
    with subprocess.Popen(
        [sys.executable, "-m", f"{package}.{name}"],
        cwd=ROOT,
        env={**kept, "PORT": "0", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        try:
            printed = []
            for line in process.stdout:  # a warning precedes it if a test has already started the same example
                printed.append(line)
                if url := next((word for word in line.split() if word.startswith("http://")), None):
                    break
            else:
                pytest.fail(f"{name} ended without printing an address: {''.join(printed)}")
            yield Server(process, url)
        finally:
            process.kill()


@pytest.fixture(scope="session")
def node_ready() -> Iterator[None]:
    node_binary()
    npm_packages(node.CLIENTS)
    yield
    node.shared.end()


both_brokers = pytest.mark.parametrize(
    "broker_url", ["memory", pytest.param("redis", marks=pytest.mark.redis)], indirect=True, scope="session"
)
"""For one test per capability. The others run on the memory broker, because the HTTP side is the same."""


@pytest.fixture(scope="session")
def broker_url(request: pytest.FixtureRequest) -> str:
    """The broker of a site."""
    if getattr(request, "param", "memory") == "memory":
        return "memory"
    url: str = request.getfixturevalue("redis_url")
    return url


@pytest.fixture(scope="session")
def site(broker_url: str) -> Iterator[Site]:
    """One server for all tests with the official clients that do not stop it. Each test uses its own runs."""
    with serving_site(broker_url) as running:
        yield running
