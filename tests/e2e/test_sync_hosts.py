"""Sync code in real servers: routes in worker threads, sync views, WSGI, scripts, and how their threads end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.e2e.hosts.servers import GUARD_S, ROOT, Serving, serving
from tests.e2e.proxies import running
from tests.ports import free_port

pytestmark = [pytest.mark.slow]

APP = "tests.e2e.sync_app:app"
CELLS = [
    ("fastapi", "uvicorn"),
    ("flask", "uvicorn"),
    ("django", "hypercorn"),
    ("starlette", "hypercorn-trio"),
    ("fastapi", "granian"),
]
"""Each host and each server, in pairs."""


def work(url: str, number: int) -> dict[str, object]:
    response = httpx.get(f"{url}/job/{number}", timeout=GUARD_S)
    assert response.status_code == 200, response.text
    answer: dict[str, object] = response.json()
    return answer


def expected(number: int) -> dict[str, object]:
    return {"output": number * 2, "chunks": [number, number * 2, number * 3], "status": "COMPLETED"}


@contextmanager
def served(host: str, server: str, folder: Path) -> Iterator[Serving]:
    with serving(server, folder, {"HOST": host}, app=APP) as found:
        yield found


@pytest.mark.parametrize(("host", "server"), CELLS)
def test_sync_routes_call_and_threads_do_not_hold_up_the_exit(host: str, server: str, tmp_path: Path) -> None:
    with served(host, server, tmp_path) as found:
        assert work(found.url, 4) == expected(4)
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda number: work(found.url, number), range(24)))
        assert answers == [expected(number) for number in range(24)]

        if host != "flask":  # its views never run on the event loop
            refused = httpx.get(f"{found.url}/mistake", timeout=GUARD_S)
            assert "realtime.sync was called on an event loop's thread: await the async call there" in refused.text
        assert work(found.url, 5) == expected(5)  # no thread is stuck

        assert "begun" in httpx.get(f"{found.url}/wait", timeout=GUARD_S).text
        found.terminate()
        assert found.wait() in (0, -signal.SIGTERM)
        log = found.log.read_text()
        assert "Traceback" not in log and "never awaited" not in log
        if server != "uvicorn":  # it raises the signal again, and the thread may not run in time
            assert "the thread got ServerShutdown" in log


@contextmanager
def flask_alone(folder: Path, broker: str) -> Iterator[str]:
    """Flask's development server, which uses a thread per request."""
    port = free_port()
    command = [sys.executable, "-m", "flask", "--app", APP, "run", "--port", str(port)]
    with running(command, port, folder / "flask.log", HOST="wsgi", BROKER=broker):
        yield f"http://127.0.0.1:{port}"


def test_wsgi_with_the_memory_broker_is_rejected(tmp_path: Path) -> None:
    with flask_alone(tmp_path, "memory://") as url:
        refused = httpx.get(f"{url}/mistake", timeout=GUARD_S).json()
        assert "its broker is in memory, so the call would have no effect" in refused
        assert "start it with the app first, or use a broker that processes share" in refused


@pytest.mark.redis
def test_wsgi_with_redis(redis_url: str, tmp_path: Path) -> None:
    with flask_alone(tmp_path, redis_url) as url, ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda number: work(url, number), range(24)))
    assert answers == [expected(number) for number in range(24)]


SCRIPT = """
    import os, signal, sys
    from tests.e2e.sync_app import double, realtime
"""


@contextmanager
def script(lines: str, redis_url: str) -> Iterator[subprocess.Popen[str]]:
    """A separate program that calls `realtime.sync` and has no event loop. It is killed if the test did not end it."""
    source = textwrap.dedent(SCRIPT) + textwrap.dedent(lines)
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", source],
        cwd=ROOT,
        env={**os.environ, "BROKER": redis_url},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.redis
def test_a_script_calls_and_ends(redis_url: str) -> None:
    lines = """
        handle = realtime.sync.trigger(double, 21)
        print(realtime.sync.result(handle, timeout=30), list(realtime.sync.read(handle)))
    """
    with script(lines, redis_url) as process:
        printed, errors = process.communicate(timeout=GUARD_S)
    assert (process.returncode, printed, errors) == (0, "42 [21]\n", "")


@pytest.mark.redis
def test_a_script_that_exits_ends_its_runs(redis_url: str) -> None:
    """They stayed EXECUTING until their lease expired."""
    lines = """
        import threading
        def endless():
            while True:
                yield "a"
                threading.Event().wait(0.01)
        pipe = realtime.sync.pipe(endless())
        print(next(pipe), pipe.run_id)
    """
    with script(lines, redis_url) as process:
        printed, errors = process.communicate(timeout=GUARD_S)
    assert process.returncode == 0
    assert "1 cut after" in errors and "Traceback" not in errors
    run_id = printed.split()[1]
    with script(
        f"record = realtime.sync.get_run({run_id!r}); print(record.status, record.error.message)", redis_url
    ) as process:
        printed, errors = process.communicate(timeout=GUARD_S)
    assert (printed, errors) == ("FAILED the server was shut down\n", "")


@pytest.mark.redis
def test_a_script_that_exits_finishes_its_runs(redis_url: str) -> None:
    """No executor resolves names while Python exits, so new connections failed and leases expired."""
    lines = """
        import threading
        from asgi_realtime import Realtime, Timeouts
        def source():
            for _ in range(30):
                yield "a"
                threading.Event().wait(0.1)
        named = os.environ["BROKER"].replace("127.0.0.1", "localhost")
        short = Realtime(secret_key="0" * 32, broker=named, timeouts=Timeouts(lease=1))
        print(short.sync.pipe(source()).handle.id)
    """
    with script(lines, redis_url) as process:
        printed, errors = process.communicate(timeout=GUARD_S)
    assert errors == ""
    with script(f"print(realtime.sync.get_run({printed.strip()!r}).status)", redis_url) as process:
        assert process.communicate(timeout=GUARD_S)[0] == "COMPLETED\n"


@pytest.mark.redis
@pytest.mark.parametrize(
    "waiting",
    [
        "realtime.sync.result(handle)",
        "list(realtime.sync.read(handle))",
        "list(realtime.sync.subscribe_to_runs_with_tag('unused'))",
    ],
    ids=["result", "read", "subscribe"],
)
def test_ctrl_c_ends_a_script_that_waits(redis_url: str, waiting: str) -> None:
    lines = f"""
        handle = realtime.sync.trigger(double, 21, delay="1h")
        print("waits", flush=True)
        {waiting}
    """
    with script(lines, redis_url) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waits\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=GUARD_S)
    assert process.returncode == -signal.SIGINT
    assert errors.splitlines()[-1] == "KeyboardInterrupt"


@pytest.mark.redis
def test_ctrl_c_cancels_the_run_that_a_script_has_open(redis_url: str) -> None:
    lines = """
        try:
            with realtime.sync.open_run("import") as run:
                print("open", flush=True)
                signal.pause()
        except KeyboardInterrupt:
            print(realtime.sync.get_run(run).status)
    """
    with script(lines, redis_url) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=GUARD_S)
    assert (process.returncode, printed, errors) == (0, "CANCELED\n", "")


@pytest.mark.redis
def test_forked_children_can_all_call(redis_url: str) -> None:
    """As in a server that forks its workers after it imported the app."""
    lines = """
        import threading
        before = realtime.sync.result(realtime.sync.trigger(double, 1), timeout=30)
        children = []
        for number in range(3):
            pid = os.fork()
            if not pid:
                outputs = []
                call = lambda: outputs.append(realtime.sync.result(realtime.sync.trigger(double, number), timeout=30))
                threads = [threading.Thread(target=call) for _ in range(4)]
                for thread in threads: thread.start()
                for thread in threads: thread.join()
                os._exit(0 if outputs == [number * 2] * 4 else 1)
            children.append(pid)
        print(before, [os.waitpid(pid, 0)[1] for pid in children])
    """
    with script(lines, redis_url) as process:
        printed, errors = process.communicate(timeout=GUARD_S)
    assert (process.returncode, printed, errors) == (0, "2 [0, 0, 0]\n", "")


@pytest.mark.redis
def test_an_app_whose_module_calls_during_its_import_starts(redis_url: str, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(
        "from tests.e2e import sync_app\n"
        "assert sync_app.realtime.sync.result(sync_app.realtime.sync.trigger('double', 2), timeout=30) == 4\n"
        "app = sync_app.fastapi()\n"
    )
    with serving("uvicorn", tmp_path, {"BROKER": redis_url}, app="app:app", cwd=tmp_path) as found:
        assert work(found.url, 4) == expected(4)
        found.terminate()
        assert found.wait() in (0, -signal.SIGTERM)
        assert "Traceback" not in found.log.read_text()


def test_a_module_that_calls_during_its_import_gets_an_error_in_memory(tmp_path: Path) -> None:
    """It must not wait forever: uvicorn imports the app on the event loop's thread, others before they have a loop."""
    (tmp_path / "app.py").write_text("from tests.e2e import sync_app\nsync_app.realtime.sync.trigger('double', 2)\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for command in ("uvicorn app:app", "hypercorn app:app", "granian --interface asgi app:app"):
        options = ["--bind", f"127.0.0.1:{free_port()}"] if "hypercorn" in command else ["--port", str(free_port())]
        done = subprocess.run(
            [sys.executable, "-m", *command.split(), *options],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=GUARD_S,
        )
        output = done.stdout + done.stderr
        assert "its broker is in memory" in output or "called on an event loop's thread" in output, (command, output)
