"""What only `SyncRealtimeClient` has to take care of: threads, signals, forks and the end of the process."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import anyio
import httpx
import pytest

from asgi_realtime import InvalidConfiguration, UsageError
from asgi_realtime.client import SyncRealtimeClient
from tests.client.scripted import END, HOLD, ScriptedServer, chunk, stream
from tests.inprocess import GUARD_S

TOKEN = "aaa.bbb.ccc"


def loop_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "asgi_realtime sync"}


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + GUARD_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextmanager
def signal_after(event: threading.Event, handler: Callable[[], None]) -> Iterator[None]:
    """Run `handler` in the main thread, as a signal handler, once the event is set."""

    def send() -> None:
        assert event.wait(GUARD_S)
        os.kill(os.getpid(), signal.SIGUSR1)

    previous = signal.signal(signal.SIGUSR1, lambda *_: handler())
    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield
    finally:
        sender.join()
        signal.signal(signal.SIGUSR1, previous)


def test_an_unused_client_starts_no_thread() -> None:
    before = loop_threads()
    with SyncRealtimeClient("http://127.0.0.1:1", TOKEN) as client:
        chunks = client.read("run_1")
    assert loop_threads() == before
    assert list(chunks) == []


def test_a_closed_client_leaves_no_thread() -> None:
    before = loop_threads()
    with ScriptedServer(stream(chunk(0)) + HOLD) as server:
        with SyncRealtimeClient(server.origin, TOKEN) as client:
            assert next(client.read("run_1")) == 0
            assert len(loop_threads() - before) == 1
        assert server.disconnected.wait(GUARD_S)
    assert loop_threads() == before


def test_a_client_that_is_garbage_collected_leaves_no_thread_and_no_connection() -> None:
    before = loop_threads()
    with ScriptedServer(stream(chunk(0)) + HOLD) as server:
        client = SyncRealtimeClient(server.origin, TOKEN)
        chunks = client.read("run_1")
        assert next(chunks) == 0
        del client, chunks
        gc.collect()
        assert server.disconnected.wait(GUARD_S)
    wait_until(lambda: loop_threads() == before)


def test_an_interrupt_closes_the_connection_and_loses_nothing() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with ScriptedServer(HOLD, stream(chunk(0), END)) as server, SyncRealtimeClient(server.origin, TOKEN) as client:
        chunks = client.read("run_1")
        with pytest.raises(KeyboardInterrupt), signal_after(server.was_requested, interrupt):
            next(chunks)
        assert server.disconnected.wait(GUARD_S)
        assert list(chunks) == [0]


def test_an_interrupt_abandons_a_token_function_that_blocks() -> None:
    entered, release = threading.Event(), threading.Event()

    def interrupt() -> None:
        raise KeyboardInterrupt

    def token() -> str:
        entered.set()
        assert release.wait(GUARD_S)
        return TOKEN

    with ScriptedServer(stream(chunk(0), END)) as server, SyncRealtimeClient(server.origin, token) as client:
        chunks = client.read("run_1")
        with pytest.raises(KeyboardInterrupt), signal_after(entered, interrupt):
            next(chunks)
        release.set()
        assert list(chunks) == [0]


def test_a_token_function_that_exits_leaves_the_client_usable() -> None:
    tokens: Iterator[Any] = iter([SystemExit(1), TOKEN])

    def token() -> str:
        found = next(tokens)
        if isinstance(found, BaseException):
            raise found
        return str(found)

    with ScriptedServer(stream(chunk(0), END)) as server, SyncRealtimeClient(server.origin, token) as client:
        chunks = client.read("run_1")
        with pytest.raises(RuntimeError, match=r"the token function raised SystemExit\(1\)"):
            next(chunks)
        assert list(chunks) == [0]


def test_a_signal_handler_can_close_what_the_main_thread_reads() -> None:
    with ScriptedServer(HOLD) as server, SyncRealtimeClient(server.origin, TOKEN) as client:
        with signal_after(server.was_requested, client.close):
            assert list(client.read("run_1")) == []


def test_the_token_function_sees_context_variables_and_blocks_no_other_client() -> None:
    entered, release = threading.Event(), threading.Event()
    tenant: ContextVar[str] = ContextVar("tenant")
    seen: list[str] = []

    def token() -> str:
        seen.append(tenant.get())
        entered.set()
        assert release.wait(GUARD_S)
        return TOKEN

    def read() -> None:
        tenant.set("acme")
        list(slow.read("run_1"))

    with ScriptedServer(stream(END)) as server:
        slow, other = SyncRealtimeClient(server.origin, token), SyncRealtimeClient(server.origin, TOKEN)
        with slow, other:
            reader = threading.Thread(target=read)
            reader.start()
            assert entered.wait(GUARD_S)
            assert list(other.read("run_2")) == []
            release.set()
            reader.join(GUARD_S)
    assert seen == ["acme"]


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_it_works_in_a_thread_that_runs_an_event_loop(backend: str) -> None:
    """As in a notebook. On trio, a token function failed."""

    async def main() -> list[Any]:
        with SyncRealtimeClient(server.origin, lambda: TOKEN) as client:
            return list(client.read("run_1"))

    with ScriptedServer(stream(chunk(0), END)) as server:
        assert anyio.run(main, backend=backend) == [0]


def test_an_http_client_for_threads_is_refused() -> None:
    with httpx.Client() as http, pytest.raises(InvalidConfiguration, match="pass an httpx.AsyncClient"):
        SyncRealtimeClient("http://127.0.0.1:1", TOKEN, http=http)  # type: ignore[arg-type]


def test_an_http_client_that_was_passed_is_closed_with_the_client() -> None:
    http = httpx.AsyncClient()
    with ScriptedServer(stream(END)) as server, SyncRealtimeClient(server.origin, TOKEN, http=http) as client:
        assert list(client.read("run_1")) == []
        assert not http.is_closed
    assert http.is_closed


def test_closing_a_client_ends_its_subscriptions() -> None:
    with ScriptedServer(stream(chunk(0), chunk(1)) + HOLD) as server:
        with SyncRealtimeClient(server.origin, TOKEN) as client:
            started, unused = client.read("run_1"), client.read("run_1")
            assert next(started) == 0
        assert list(started) == list(unused) == []
        started.close()
        with pytest.raises(UsageError, match="this client is closed"):
            client.get_run("run_1")


SCRIPT = """
import os, sys
from asgi_realtime.client import SyncRealtimeClient

used, unused = (SyncRealtimeClient(sys.argv[1], lambda: "aaa.bbb.ccc") for _ in range(2))
chunks = used.read("run_1")
print(next(chunks), flush=True)
if os.fork() == 0:
    with used:
        try:
            used.get_run("run_1")
        except Exception as exc:
            print(exc)
        try:
            next(chunks)
        except Exception as exc:
            print(type(exc).__name__)
    print(next(unused.read("run_1")), flush=True)
    sys.exit()
os.wait()
"""


def test_a_fork_and_the_exit_of_a_process_with_open_clients() -> None:
    """A child cannot use the loop of its parent, and no open client keeps a process from exiting."""
    with ScriptedServer(stream(chunk(0)) + HOLD, concurrent=True) as server:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", SCRIPT, server.origin], capture_output=True, text=True
        )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "0",
        "this client was used before the process forked; create a new one in the child process",
        "UsageError",
        "0",
    ]
