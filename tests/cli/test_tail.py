from __future__ import annotations

import io
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from asgi_realtime.cli import tail, terminal
from asgi_realtime.cli.tail import Target, parse_url
from asgi_realtime.core.errors import UsageError
from tests.cli.command import Command
from tests.client.scripted import ScriptedServer, answer
from tests.e2e.hosts.guest import SECRET
from tests.e2e.hosts.servers import Serving, serving
from tests.inprocess import GUARD_S

pytestmark = [pytest.mark.slow, pytest.mark.server]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with serving("uvicorn", tmp_path_factory.mktemp("server"), {"HOST": "starlette", "ENTRY": "mount"}) as running:
        yield running


@pytest.fixture(autouse=True)
def secret(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key of the server, instead of that of the other commands' tests."""
    monkeypatch.setenv("REALTIME_SECRET_KEY", SECRET)


def do(server: Serving, **body: Any) -> dict[str, Any]:
    answer: dict[str, Any] = httpx.post(f"{server.url}/do", json=body, timeout=60).raise_for_status().json()
    return answer


def end_run(server: Serving, *chunks: Any) -> str:
    """Return the id of a run that has ended CANCELED."""
    run = do(server, do="open")
    for chunk in chunks:
        do(server, do="append", run=run["id"], chunk=chunk)
    cancel = f"{server.url}/realtime/api/v2/runs/{run['id']}/cancel"
    httpx.post(cancel, headers={"authorization": f"Bearer {SECRET}"}, timeout=60).raise_for_status()
    run_id: str = run["id"]
    return run_id


def test_text_chunks_are_joined_and_others_are_printed_line_by_line(server: Serving, command: Command) -> None:
    run_id = end_run(server, "Hel", "lo", {"n": 1}, "é")
    done = command("tail", f"{server.url}/realtime/v1/streams/{run_id}/default")
    assert done.out == 'Hello\n{"n": 1}\né\n'
    assert done.code == 1 and done.err.startswith("run_canceled: ")
    done = command("tail", "--json", "--from", "2", f"{server.url}/realtime/v1/streams/{run_id}/default")
    assert [json.loads(line) for line in done.out.splitlines()] == [{"n": 1}, "é"]


def test_a_run_is_printed_state_by_state(server: Serving, command: Command) -> None:
    run_id = end_run(server)
    done = command("tail", f"{server.url}/realtime/v1/runs/{run_id}")
    assert done.code == 1  # it did not complete
    assert f"  {run_id}  pipe  CANCELED" in done.out.splitlines()[-1]
    (line,) = command("tail", "--json", f"{server.url}/realtime/v1/runs/{run_id}").out.splitlines()
    assert json.loads(line)["id"] == run_id


def test_a_model_cannot_control_the_terminal(
    server: Serving, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, joined = "\u200b\u200f\u2063\U000e0041", "👩\u200d🚀"
    run_id = end_run(server, "\x1b]0;owned\x07", "é\u202e", hidden, joined)
    url = f"{server.url}/realtime/v1/streams/{run_id}/default"
    assert command("tail", url).out == f"\x1b]0;owned\x07é\u202e{hidden}{joined}\n"
    monkeypatch.setattr(terminal, "_is_terminal", lambda stream: True)
    assert command("tail", url).out == f"�]0;owned�é�����{joined}\n"


@pytest.mark.parametrize(
    ("chunks", "printed"),
    [(["a\ud83d", "\ude00b"], "a😀b\n"), (["\ude00", "a"], "�a\n"), (["a\ud83d"], "a�\n"), ([["\ud83d"]], '["�"]\n')],
)
def test_halves_of_a_character_are_joined(
    chunks: list[object], printed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Printing half of an emoji raised `UnicodeEncodeError`."""
    tail._print_chunks(chunks, as_json=False)
    assert capsys.readouterr().out == printed


def test_refusals_are_reported(server: Serving, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = end_run(server)
    done = command("tail", f"{server.url}/realtime/v1/runs/run_unknown?access_token={do(server, do='open')['token']}")
    assert done.code == 1 and done.err
    monkeypatch.delenv("REALTIME_SECRET_KEY")
    done = command("tail", f"{server.url}/realtime/v1/runs/{run_id}")
    assert done.code == 2 and "no token: put it" in done.err
    monkeypatch.setenv("REALTIME_ACCESS_TOKEN", "x.y.z")
    done = command("tail", f"{server.url}/realtime/v1/runs/{run_id}")
    assert done.code == 1 and "invalid_token" in done.err


def test_a_token_need_not_be_in_the_arguments(
    server: Serving, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ps` shows the arguments of a process to every user of the machine."""
    monkeypatch.delenv("REALTIME_SECRET_KEY")
    run = do(server, do="open")
    url = f"{server.url}/realtime/v1/runs/run_unknown?access_token={run['token']}"
    assert "other users can see the token" in command("tail", url).err
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{url}\n"))
    done = command("tail", "-")
    assert done.code == 1 and done.err.startswith("run_not_found: ")


def test_ctrl_c_exits_quietly(server: Serving) -> None:
    run = do(server, do="open")
    do(server, do="append", run=run["id"], chunk="first\n")
    command = [sys.executable, "-m", "asgi_realtime", "tail", f"{server.url}/realtime/v1/streams/{run['id']}/default"]
    env = {**os.environ, "REALTIME_ACCESS_TOKEN": run["token"]}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "first\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=GUARD_S)
    assert (process.returncode, out, err) == (130, "", "")


def test_a_pipe_that_closes_early_is_not_an_error(server: Serving) -> None:
    """As with `| head -1`."""
    run_id = end_run(server, *[{"n": number} for number in range(20)])
    url = f"{server.url}/realtime/v1/streams/{run_id}/default"
    command = f"'{sys.executable}' -m asgi_realtime tail '{url}' | head -1"
    done = subprocess.run(["bash", "-c", command], env={**os.environ}, capture_output=True, text=True)
    assert done.stdout == '{"n": 0}\n'
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("url", "target"),
    [
        (
            "https://a.example/realtime/v1/streams/run_1/default?access_token=t",
            Target("https://a.example/realtime", "streams", ("run_1", "default"), "t"),
        ),
        ("http://a/x/v1/runs/run_1/", Target("http://a/x", "runs", ("run_1",), None)),
        ("http://a/v1/runs?tags=a%3A1,b", Target("http://a", "tags", ("a:1", "b"), None)),
        ("http://a/api/v1/v1/runs/run_1", Target("http://a/api/v1", "runs", ("run_1",), None)),
        ("http://a/api/v1/realtime/v1/runs/run_1", Target("http://a/api/v1/realtime", "runs", ("run_1",), None)),
        ("http://a/v1/streams/v1/default", Target("http://a", "streams", ("v1", "default"), None)),
        ("http://a/v1/streams/run_1/v1", Target("http://a", "streams", ("run_1", "v1"), None)),
        ("http://a/v1/batches/batch_1", Target("http://a", "batches", ("batch_1",), None)),
    ],
)
def test_urls(url: str, target: Target) -> None:
    assert parse_url(url) == target


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1/v1/runs/x",
        "http://a:99999/v1/runs/x",
        "run_1",
        "http://a/",
        "ftp://a/v1/runs/1",
        "http://a/v1/runs",
        "http://a/v1/health",
        "http://a..b/v1/runs/x",
        f"http://{'a' * 64}.example/v1/runs/x",
    ],
)
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(UsageError, match="not the URL of a run or a stream|is not a URL"):
        parse_url(url)


def test_whitespace_around_a_token_in_the_environment_is_ignored(
    server: Serving, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token from a file ends with a newline, which caused a traceback."""
    run = do(server, do="open")
    url = f"{server.url}/realtime/v1/runs/run_unknown"
    monkeypatch.setenv("REALTIME_ACCESS_TOKEN", f" {run['token']}\n")
    assert command("tail", url).code == 1  # the token is accepted, but not for this run
    monkeypatch.setenv("REALTIME_ACCESS_TOKEN", "a token")
    done = command("tail", url)
    assert done.code == 2 and "characters that no token contains" in done.err
    assert "a token" not in done.err


def test_a_server_cannot_control_the_terminal(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "_is_terminal", lambda stream: True)
    for status, code in ((404, 1), (422, 2)):
        body = b'{"error":"\\u001b]0;owned\\u0007","code":"%b"}' % {404: b"run_not_found", 422: b"invalid"}[status]
        with ScriptedServer(answer(status, body)) as server:
            done = command("tail", f"{server.origin}/v1/runs/run_1")
        assert done.code == code
        assert "\N{REPLACEMENT CHARACTER}]0;owned\N{REPLACEMENT CHARACTER}" in done.err
        assert "\x1b" not in done.err


def test_a_log_cannot_control_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    record = logging.makeLogRecord({"msg": "\x9b31m"})
    assert terminal.HarmlessFormatter("%(message)s").format(record) == "\x9b31m"
    monkeypatch.setattr(terminal, "_is_terminal", lambda stream: stream is sys.stderr)
    assert terminal.HarmlessFormatter("%(message)s").format(record) == "\N{REPLACEMENT CHARACTER}31m"


def test_a_created_token_grants_only_what_the_url_needs() -> None:
    assert Target("http://a", "batches", ("batch_1",), None).scope == "read:batch:batch_1"
    assert Target("http://a", "tags", ("user:1", "b"), None).scope == "read:tags:user:1"
