"""Requests that the official clients never send, to the routes that they use: each gets its status at once."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterable, Mapping
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import both_brokers
from tests.e2e.site import GUARD_S, SECRET, Opened, Site

pytestmark = [pytest.mark.slow, both_brokers]

OFFICIAL = {"authorization": f"Bearer {SECRET}", "trigger-version": "4.8.3"}

MUST_REFETCH = [{"headers": {"control": "must-refetch"}}]
EMOJI = "%F0%9F%98%80"

FEED_QUERIES = [
    # Positions to resume from
    ("", 400),
    ("offset=", 400),
    ("offset=-2", 400),
    ("offset=0", 400),
    ("offset=1_0_0", 400),
    ("offset=1_x", 400),
    ("offset=%00", 400),
    ("offset=%FF%FE", 400),
    (f"offset={EMOJI}", 400),
    ("offset=" + "9" * 40 + "_0", 400),
    ("offset=now", 400),
    ("offset=-1&offset=x", 400),
    # A foreign cursor: the client starts over
    ("offset=1_0", 409),
    ("offset=1_0&handle=", 409),
    ("offset=1_0&handle=ffffffff.0", 409),
    ("offset=1_0&handle=ffffffff.0&live=true", 409),
    ("offset=1_0&handle=x", 409),
    ("offset=1_0&handle=..", 409),
    ("offset=1_0&handle=%00%0D%0A", 409),
    (f"offset=1_0&handle={EMOJI}", 409),
    ("offset=1_0&handle=" + "a" * 5000, 409),
    # Ignored parameters
    ("offset=-1", 200),
    ("offset=-1&live=true&cursor=" + "1" * 2000, 200),
    ("offset=-1&live=perhaps&log=some&table=x&where=1%3D1&columns=a&replica=full&params=%7B%7D", 200),
    ("offset=-1&skipColumns=", 200),
    ("offset=-1&skipColumns=id,status,nothing,,%00,payload", 200),
    ("offset=-1&skipColumns=" + ",".join(["x"] * 2000), 200),
]

TAG_QUERIES = [
    ("offset=-1", 400),
    ("offset=-1&tags=", 400),
    ("offset=-1&tags=,", 400),
    ("offset=-1&tags=a,,b", 400),
    ("offset=-1&tags=a%00b", 400),
    ("offset=-1&tags=a%0Ab", 400),
    ("offset=-1&tags=a%7Fb", 400),
    ("offset=-1&tags=a%22b", 400),
    ("offset=-1&tags=a%5Cb", 400),
    ("offset=-1&tags=" + "a" * 129, 422),
    ("offset=-1&tags=" + ",".join(f"t{number}" for number in range(11)), 422),
    (f"offset=-1&tags={EMOJI}", 200),
    ("offset=-1&tags=" + "a" * 128, 200),
    ("offset=-1&tags=a&createdAt=yesterday", 400),
    ("offset=-1&tags=a&createdAt=-1h", 400),
    ("offset=-1&tags=a&createdAt=0s", 400),
    ("offset=-1&tags=a&createdAt=1", 400),
    ("offset=-1&tags=a&createdAt=24h%00", 400),
    ("offset=-1&tags=a&createdAt=" + "9" * 400 + "h", 400),
    ("offset=-1&tags=a&createdAt=100d", 200),
    ("offset=-1&tags=a&createdAt=", 200),
]

STREAM_HEADERS: list[tuple[dict[str, str], int]] = [
    ({"last-event-id": "x"}, 400),
    ({"last-event-id": "-1"}, 400),
    ({"last-event-id": "1.5"}, 400),
    ({"last-event-id": "0x1"}, 400),
    ({"last-event-id": "1 2"}, 400),
    ({"last-event-id": "9" * 19}, 400),
    ({"last-event-id": "1767323045678-0"}, 400),
    ({"timeout-seconds": "0"}, 400),
    ({"timeout-seconds": "601"}, 400),
    ({"timeout-seconds": "-5"}, 400),
    ({"timeout-seconds": "1.5"}, 400),
    ({"timeout-seconds": "1e1"}, 400),
    ({"timeout-seconds": "soon"}, 400),
    ({"timeout-seconds": ""}, 400),
    ({"last-event-id": ""}, 200),
    ({"last-event-id": "1"}, 200),
    ({"last-event-id": "9" * 18}, 409),  # past the end
    ({"timeout-seconds": "600"}, 200),
    ({"x-trigger-stream-start": "earliest"}, 200),
    ({"x-trigger-stream-start": "\u00ff"}, 200),
    ({"accept": "image/png"}, 200),
]


PATHS = [
    ("/v1/runs/run_never?offset=-1", 404),
    ("/v1/runs/%00?offset=-1", 404),
    ("/v1/runs/%FF?offset=-1", 404),
    (f"/v1/runs/{'x' * 5000}?offset=-1", 404),
    ("/v1/runs/run_never?offset=1_0&handle=ffffffff.0&live=true", 409),  # then 404, so it starts over
    ("/v1/batches/batch_never?offset=-1", 404),
    (f"/v1/batches/{EMOJI}?offset=-1", 404),
    ("/v1/streams/run_never/default", 404),
    ("/v1/streams/run_never/input/approval", 404),
    ("/v1/streams/run_never", 404),
    ("/v1/nothing", 404),
    ("/v2/runs/run_never?offset=-1", 404),
    ("/v1/runs/a/b/c", 404),
    ("/v1/streams/{run}/%00", 422),
    ("/v1/streams/{run}/$hidden", 422),
    ("/v1/streams/{run}/" + "x" * 129, 422),
    ("/v1/streams/{run}/..%2F..", 405),
    ("/v1/streams/{run}/input/%00", 422),
]

CREDENTIALS = [
    "",
    "Bearer",
    "bearer",
    "Basic YTpi",
    "Bearer x",
    "Bearer a.b.c",
    "Bearer " + "x" * 8000,
    "Bearer \u00ff",
]
CREDENTIALS += [f"Bearer {SECRET[:-1]}", f"Bearer {SECRET} x", f"Basic {SECRET}", SECRET]


@pytest.fixture(scope="module")
def run(site: Site) -> Opened:
    opened = site.open(tags=["a"])
    opened.append("a", "b")
    return opened


def ask(
    site: Site, path: str, *, method: str = "GET", headers: Mapping[str, str] = OFFICIAL, content: bytes | None = None
) -> httpx.Response:
    """The complete response, within the guard, which is far below the time that a feed is held."""
    deadline = time.monotonic() + GUARD_S
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    url = f"{site.base_url}{path}"
    with site.http.stream(method, url, headers=encoded, content=content) as answer:
        body = b""
        for part in answer.iter_bytes():
            body += part
            assert time.monotonic() < deadline, f"{method} {path} {headers} is answered for ever: {body[:1000]!r}"
    sent = httpx.Request(method, path, headers=encoded, content=content)
    return httpx.Response(answer.status_code, headers=answer.headers, content=body, request=sent)


def check(wanted: int, answer: httpx.Response) -> str | None:
    """What is wrong with a response: an error has a message and a code, and any page can read it."""
    sent = answer.request
    request = f"{sent.method} {sent.url} {dict(sent.headers)} {sent.content[:200]!r}"
    if answer.status_code != wanted:
        return f"{answer.status_code} and not {wanted}: {request}: {answer.text[:200]}"
    if answer.headers.get("access-control-allow-origin") != "*":
        return f"no CORS: {request}"
    if (
        wanted == 409
        and "/runs" in sent.url.path
        and (answer.json() != MUST_REFETCH or not answer.headers["electric-handle"])
    ):
        return f"no way to start over: {request}: {answer.text}"
    if (
        wanted >= 400
        and answer.text
        and answer.json() != MUST_REFETCH
        and not answer.json().keys() >= {"error", "code"}
    ):
        return f"no words: {request}: {answer.text}"
    return None


def wrong(answers: Iterable[tuple[int, httpx.Response]]) -> str:
    """What is wrong with each of many responses."""
    return "\n".join(said for wanted, answer in answers if (said := check(wanted, answer)))


def test_queries_of_feeds(site: Site, run: Opened) -> None:
    for feed in (f"/realtime/v1/runs/{run.id}?", "/realtime/v1/runs?tags=a&"):
        assert wrong((status, ask(site, feed + query)) for query, status in FEED_QUERIES) == ""


def test_queries_of_lists(site: Site) -> None:
    assert wrong((status, ask(site, f"/realtime/v1/runs?{query}")) for query, status in TAG_QUERIES) == ""


def test_headers_of_streams(site: Site) -> None:
    over = site.open()
    over.append("a", "b")
    over.end()
    path = f"/realtime/v1/streams/{over.id}/default"
    answers = ((status, ask(site, path, headers=OFFICIAL | headers)) for headers, status in STREAM_HEADERS)
    assert wrong(answers) == ""


def test_paths(site: Site, run: Opened) -> None:
    answers = ((status, ask(site, "/realtime" + path.replace("{run}", run.id))) for path, status in PATHS)
    assert wrong(answers) == ""


def test_methods(site: Site, run: Opened) -> None:
    for path in (f"/v1/runs/{run.id}", "/v1/runs?tags=a", "/v1/batches/b", f"/v1/streams/{run.id}/default"):
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"):
            answer = ask(site, f"/realtime{path}", method=method)
            assert check(405, answer) is None
            assert answer.headers["allow"] == "GET"


def test_credentials(site: Site, run: Opened) -> None:
    paths = [
        f"/runs/{run.id}?offset=-1",
        "/runs?tags=a&offset=-1",
        "/batches/b?offset=-1",
        f"/streams/{run.id}/default",
    ]
    for path in paths:
        official = {"trigger-version": "4.8.3"}
        answers = (
            (401, ask(site, f"/realtime/v1{path}", headers={**official, "authorization": credential}))
            for credential in CREDENTIALS
        )
        assert wrong(answers) == ""


WRITES: list[tuple[str, str, dict[str, str], bytes, int]] = [
    ("POST", "self/out", {"x-client-id": "c1"}, b"{not json}\n", 400),
    ("POST", "self/out", {"x-client-id": "c2"}, b"1\n\xff\xfe\n", 400),
    ("POST", "self/out", {"x-client-id": "c3", "x-resume-from-chunk": "x"}, b"1\n", 400),
    ("POST", "self/out", {"x-client-id": "c3", "x-resume-from-chunk": "-1"}, b"1\n", 400),
    ("POST", "self/out", {"x-client-id": "c3", "x-resume-from-chunk": "9" * 30}, b"1\n", 400),
    ("POST", "self/out", {"x-resume-from-chunk": "5"}, b"1\n", 400),
    ("POST", "self/out", {"x-client-id": ""}, b"1\n", 400),
    ("POST", "self/out", {"x-client-id": "a b"}, b"1\n", 400),
    ("POST", "self/out", {"x-client-id": "x" * 1000}, b"1\n", 400),
    ("POST", "self/out", {"x-client-id": "big"}, b'"' + b"x" * (1024 * 1024) + b'"\n', 413),
    ("POST", "other/out", {"x-client-id": "c4"}, b"1\n", 400),
    ("PUT", "other/out", {}, b"", 400),
    ("PUT", "self/%00", {}, b"", 422),
    ("HEAD", "self/out", {}, b"", 400),
    ("HEAD", "self/out", {"x-client-id": "unknown"}, b"", 200),
    ("POST", "self/out/append", {}, b"\xff\xfe", 400),
    ("POST", "self/out/append", {}, b"x" * (600 * 1024), 413),
    ("POST", "self/out/append", {"x-part-id": "a b"}, b"x", 400),
    ("POST", "input/next", {}, b"", 400),
    ("POST", "input/next", {}, b"{", 400),
    ("POST", "input/next", {}, b"[]", 400),
    ("POST", "input/next", {}, b'{"date": 1}', 400),
    ("POST", "input/next", {}, b'{"data": \xff}', 400),
    ("POST", "input/next", {}, b'{"data": "' + b"x" * (1024 * 1024) + b'"}', 413),
    ("POST", "input/%00", {}, b'{"data": 1}', 422),
    ("POST", "input/" + "x" * 129, {}, b'{"data": 1}', 422),
    ("DELETE", "self/out", {}, b"", 405),
]


def test_writes(site: Site, run: Opened) -> None:
    answers = (
        (
            status,
            ask(
                site,
                f"/realtime/v1/streams/{run.id}/{path}",
                method=method,
                headers=OFFICIAL | headers,
                content=body,
            ),
        )
        for method, path, headers, body, status in WRITES
    )
    assert wrong(answers) == ""


API: list[tuple[str, str, bytes, int]] = [
    ("POST", "/v1/tasks/echo/trigger", b"", 400),
    ("POST", "/v1/tasks/echo/trigger", b"{", 400),
    ("POST", "/v1/tasks/echo/trigger", b"[1]", 400),
    ("POST", "/v1/tasks/echo/trigger", b"\xff", 400),
    ("POST", "/v1/tasks/echo/trigger", b'{"payload": "{"}', 200),  # without a content type it is JSON
    ("POST", "/v1/tasks/echo/trigger", b'{"payload": "{}", "options": 1}', 400),
    ("POST", "/v1/tasks/echo/trigger", b'{"payload": "{}", "options": {"payloadType": "text/html"}}', 422),
    ("POST", "/v1/tasks/echo/trigger", b'{"payload": "{}", "options": {"payloadType": "application/super+json"}}', 400),
    ("POST", "/v1/tasks/echo/trigger", b'{"payload": "1", "options": {"tags": 1}}', 422),
    ("POST", "/v1/tasks/echo/trigger", b'{"payload": "1", "options": {"tags": ["a\\nb"]}}', 422),
    ("POST", "/v1/tasks/echo/trigger", b'{"payload": "1", "options": {"ttl": "soon"}}', 422),
    ("POST", "/v1/tasks/echo/trigger", b'{"payload": "1", "options": {"delay": "soon"}}', 422),
    ("POST", "/v1/tasks/echo/trigger", b'{"payload": "1", "options": {"metadata": "{"}}', 422),
    ("POST", "/v1/tasks/nothing/trigger", b"{}", 404),
    ("POST", "/v1/tasks/%00/trigger", b"{}", 404),
    ("GET", "/v1/tasks/echo/trigger", b"", 405),
    ("POST", "/v3/batches", b"", 400),
    ("POST", "/v3/batches", b"{}", 400),
    ("POST", "/v3/batches", b'{"runCount": 0}', 422),
    ("POST", "/v3/batches", b'{"runCount": -1}', 422),
    ("POST", "/v3/batches", b'{"runCount": "many"}', 400),
    ("POST", "/v3/batches", b'{"runCount": 1000000}', 422),
    ("POST", "/v3/batches/batch_never/items", b'{"index": 0, "task": "echo", "payload": "1"}\n', 404),
    ("GET", "/v2/batches/batch_never", b"", 404),
    ("GET", "/v3/runs/run_never", b"", 404),
    ("POST", "/v2/runs/run_never/cancel", b"", 404),
    ("PUT", "/v1/runs/run_never/metadata", b"{}", 404),
    ("POST", "/v1/auth/public-tokens", b"", 400),
    ("POST", "/v1/auth/public-tokens", b"{}", 400),
    ("POST", "/v1/auth/public-tokens", b'{"scopes": []}', 422),
    ("POST", "/v1/auth/public-tokens", b'{"scopes": "read"}', 400),
    ("POST", "/v1/auth/public-tokens", b'{"scopes": [1]}', 400),
    ("POST", "/v1/auth/public-tokens", b'{"scopes": ["read:runs"], "expirationTime": "soon"}', 400),
    ("POST", "/v1/auth/public-tokens", b'{"scopes": ["read:runs"], "expirationTime": 1}', 400),
    ("GET", "/v1/nothing", b"", 404),
]


def test_calls_of_the_api(site: Site) -> None:
    answers = ((status, ask(site, f"/api{path}", method=method, content=body)) for method, path, body, status in API)
    assert wrong(answers) == ""


METADATA: list[tuple[bytes, int]] = [
    (b"", 400),
    (b"{", 400),
    (b"[]", 400),
    (b"\xff", 400),
    (b'{"metadata": 1}', 400),
    (b'{"operations": {}}', 400),
    (b'{"operations": [1]}', 400),
    (b'{"operations": [{}]}', 400),
    (b'{"operations": [{"type": "explode", "key": "a"}]}', 400),
    (b'{"operations": [{"type": "set"}]}', 400),
    (b'{"operations": [{"type": "increment", "key": "a", "value": "much"}]}', 400),
]


def test_changes_of_metadata(site: Site, run: Opened) -> None:
    path = f"/api/v1/runs/{run.id}/metadata"
    assert wrong((status, ask(site, path, method="PUT", content=body)) for body, status in METADATA) == ""


def test_a_body_that_is_cut_off_is_not_a_server_error(site: Site, run: Opened) -> None:
    """What arrived before the cut is stored."""
    before = len(site.requests(f"/streams/{run.id}/self/cut"))
    head = f"POST /realtime/realtime/v1/streams/{run.id}/self/cut HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n"
    head += f"Authorization: Bearer {SECRET}\r\nX-Client-Id: cut\r\n\r\n"
    with socket.create_connection(("127.0.0.1", site.port)) as connection:
        connection.sendall(head.encode() + b'"whole"\n"half')
        site.until_asked(f"/streams/{run.id}/self/cut", times=before + 1, open=True)
        site.until(lambda: stored(site, run, "cut") == 0, "the whole line is stored")
    site.until(lambda: not any(seen["open"] for seen in site.requests(f"/streams/{run.id}/self/cut")), "it is over")
    assert all(seen["status"] != 500 for seen in site.requests(f"/streams/{run.id}/self/cut"))
    assert stored(site, run, "cut") == 0
    answer = ask(site, f"/realtime/v1/streams/{run.id}/cut", headers=OFFICIAL | {"timeout-seconds": "1"})
    assert chunks_of(answer) == ["whole"]


def chunks_of(answer: httpx.Response) -> list[Any]:
    batches = [json.loads(line[6:]) for line in answer.text.split("\n") if line.startswith("data: ")]
    return [json.loads(record["body"])["data"] for batch in batches for record in batch["records"]]


def stored(site: Site, run: Opened, client_id: str) -> int:
    """The index of the last chunk of a writer."""
    headers = OFFICIAL | {"x-client-id": client_id}
    answer = ask(site, f"/realtime/v1/streams/{run.id}/self/cut", method="HEAD", headers=headers)
    return int(answer.headers["x-last-chunk-index"])
