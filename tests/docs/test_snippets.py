"""Every code block in the documents does what the text around it claims."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from fastapi import FastAPI

from asgi_realtime import EXPOSED_HEADERS, Limits, PipeResult, Realtime, Retention, Status, Timeouts, current_run
from asgi_realtime.brokers.redis import RedisBroker
from asgi_realtime.testing import AsgiClient, Event, EventParser
from tests.chromium import launched
from tests.docs.blocks import BLOCKS, NO_CODE, ROOT, Block, blocks
from tests.docs.programs import GUARD_S, completions_endpoint, served
from tests.requirements import missing

if TYPE_CHECKING:
    from playwright.sync_api import Page

SECRET = "a secret that is long enough for the tests"
WORDS = "Each word is sent as soon as it is produced.".split()

FRAGMENTS = blocks("fragment")
PROGRAMS = blocks("program")
NEEDS = {"options": "tasks", "batches": "tasks"}
"""Fragments that continue another one."""

Names = dict[str, Any]


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language not in NO_CODE], ids=str)
def test_every_block_of_code_is_tested(block: Block) -> None:
    kinds = {"program", "worker", "fragment", "sample", "curl", "browser", "conformance", "client", "host", "lines"}
    kinds |= {"pytest", "parts", "chat", "example", "page", "recipe", "script", "tsx", "nginx", "prometheus"}
    assert block.kind in kinds


def test_names_of_blocks_differ() -> None:
    named = [(block.kind, block.name) for block in BLOCKS if block.kind]
    assert len(named) == len(set(named))


@pytest.mark.parametrize("block", blocks("example").values(), ids=str)
def test_code_of_an_example_is_quoted_exactly(block: Block) -> None:
    folder = ROOT / "examples" / f"{block.name.rpartition('_')[0]}_app"
    sources = [*folder.glob("*.py"), *folder.glob("src/*.tsx")]
    assert any(f"\n{block.text}" in source.read_text("utf-8") for source in sources)


# Fragments


async def tokens() -> AsyncIterator[str]:
    for token in ("Hel", "lo, ", "you!"):
        yield token


async def finished_run(realtime: Realtime) -> str:
    async with realtime.open_run("sample", tags=["user:1"]) as run:
        await realtime.append("Hel")
        await realtime.append("lo")
        run.set_output({"text": "Hello"})
    return run.id


async def execute(block: Block, names: Names) -> None:
    """Run a block that can have `await` at the top level. Tracebacks show the line in the document."""
    source = "\n" * (block.line - 1) + block.text
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    code = compile(source, str(block.document), "exec", flags=flags, dont_inherit=True)
    result = eval(code, names)
    if inspect.isawaitable(result):
        await result


async def record_of(names: Names) -> Any:
    return await names["realtime"].get_run(names["run"])


async def check_tokens(names: Names, printed: str) -> None:
    assert names["claims"].scopes == ("read:tags:user:1",)
    assert names["realtime"].verify_token(names["one_run"]).scopes == (f"read:runs:{names['run'].id}",)


async def check_cors(names: Names, printed: str) -> None:
    assert names["realtime"].cors.origins == ("https://app.example",)


async def check_middleware(names: Names, printed: str) -> None:
    assert (await AsgiClient(names["app"]).get("/realtime/v1/health")).status_code == 200


async def check_reading(names: Names, printed: str) -> None:
    assert printed.splitlines() == ["Hel", "lo", "COMPLETED {} {'text': 'Hello'}"]


async def check_testing(names: Names, printed: str) -> None:
    await names["test_count_sends_every_number"]()


async def check_limits(names: Names, printed: str) -> None:
    realtime: Realtime = names["realtime"]
    assert realtime.limits.tags == 20
    assert realtime.retention.stream_bytes == 32 * 1024 * 1024
    assert realtime.timeouts.drain == 20


async def check_hypercorn(names: Names, printed: str) -> None:
    assert names["hypercorn"].watch(names["realtime"]) is False  # another server runs in this process


async def check_own_stream(names: Names, printed: str) -> None:
    """No exception leaves the body: a run that fails ends it, and a run of another process leaves it incomplete."""
    realtime: Realtime = names["realtime"]

    async def failing() -> AsyncIterator[str]:
        yield "a"
        raise ValueError

    failed = await AsgiClient(names["app"]).get(f"/answers/{realtime.pipe(failing()).handle.id}")
    assert failed.text == 'data: "a"\n\nevent: end\ndata: "the run ended failed: task failed"\n\n'

    elsewhere = realtime.tasks.records.new_open_run("elsewhere", {}).record
    await realtime.runs.create(elsewhere)
    await realtime.append("a", run=elsewhere.id)
    async with AsgiClient(names["app"]).stream(f"/answers/{elsewhere.id}") as response:
        assert await response.chunk() == b'data: "a"\n\n'
        realtime.begin_shutdown()
        assert await response.read() == b""
        assert response.ended


async def check_client(names: Names, printed: str) -> None:
    assert printed.splitlines() == ['0 message "Hel"', '1 message "lo"', '2 end {"reason":"complete"}', "200 COMPLETED"]


async def check_clock(names: Names, printed: str) -> None:
    assert printed == "401 token_expired\n"


async def check_faults(names: Names, printed: str) -> None:
    cut = f"GET {names['path']} cut after 1 events"
    assert printed == f"""['"Hel"'] ['"lo"', '{{"reason":"complete"}}'] ['{cut}']\n"""


async def check_tasks(names: Names, printed: str) -> None:
    assert names["output"] == {"pages": 3}
    record = await names["realtime"].get_run(names["handle"])
    assert record.metadata == {"page": 3}
    assert record.max_duration_s == 600


async def check_open_run(names: Names, printed: str) -> None:
    record = await record_of(names)
    assert (record.status, record.output, record.metadata) == (Status.COMPLETED, {"rows": 300}, {"progress": 1.0})
    assert record.streams == ("progress",)


async def check_pipe(names: Names, printed: str) -> None:
    assert names["text"] == "Hello, you!"
    assert names["result"] == PipeResult(chunks=3, bytes=17, last_index=2)
    assert str(names["result"]) in FRAGMENTS["pipe"].text


async def check_parts(names: Names, printed: str) -> None:
    assert printed == "Hello, you!"


async def check_writer(names: Names, printed: str) -> None:
    chunks = [chunk async for chunk in names["realtime"].read(names["run"], "log")]
    assert chunks == [{"step": 1}, "Hel", "lo, ", "you!"]


async def check_define_stream(names: Names, printed: str) -> None:
    assert printed == "1\n"


async def check_metadata(names: Names, printed: str) -> None:
    record = await record_of(names)
    assert record.metadata == {"progress": 0.5, "rows": 100, "warnings": ["row 7 is empty"]}
    assert record.tags == ("urgent",)


async def check_inputs(names: Names, printed: str) -> None:
    assert names["output"] == "published"


async def check_cancel(names: Names, printed: str) -> None:
    assert names["record"].is_completed


async def check_stop(names: Names, printed: str) -> None:
    realtime: Realtime = names["realtime"]

    @realtime.task("forever")
    async def forever() -> None:
        await current_run().input("never").get()

    handle = await realtime.trigger(forever, tags="user:1")
    path = f"/runs/{handle.id}/stop"
    assert (await AsgiClient(names["app"]).post("/runs/run_gone/stop", query={"user": "1"})).status_code == 404
    assert (await AsgiClient(names["app"]).post(path, query={"user": "2"})).status_code == 404
    assert (await AsgiClient(names["app"]).post(path, query={"user": "1"})).status_code == 204
    async for record in realtime.subscribe_to_run(handle):
        last = record
    assert last.status is Status.CANCELED


async def check_canceled(names: Names, printed: str) -> None:
    realtime: Realtime = names["realtime"]
    assert await (await realtime.trigger(names["simulate"], 3)).result() == 1.25
    executes, is_canceled = threading.Event(), threading.Event()

    def observed() -> Any:
        executes.set()
        if current_run().canceled:
            is_canceled.set()
        return current_run()

    names["current_run"] = observed
    handle = await realtime.trigger(names["simulate"], 5_000_000)
    assert await asyncio.to_thread(executes.wait, GUARD_S)
    await realtime.cancel(handle)
    assert await asyncio.to_thread(is_canceled.wait, GUARD_S)
    assert (await realtime.runs.ended(handle.id)).status is Status.CANCELED


async def check_unwatched(names: Names, printed: str) -> None:
    realtime: Realtime = names["realtime"]
    await names["handle"].result()
    record = await realtime.runs.get(names["handle"].id)
    assert (record.metadata, record.counts_watchers, record.unwatched_grace_s) == ({"watchers": 0}, True, 30.0)


async def check_options(names: Names, printed: str) -> None:
    realtime = names["realtime"]
    assert (await realtime.get_run(names["later"])).status is Status.DELAYED
    assert (await realtime.get_run(names["brief"])).ttl == "30s"


async def check_threads(names: Names, printed: str) -> None:
    assert names["busy_run_id"] == names["first"].id
    assert names["active"].id == names["second"].id
    assert (await names["realtime"].runs.ended(names["first"].id)).status is Status.CANCELED


async def check_batches(names: Names, printed: str) -> None:
    assert names["outputs"] == [{"pages": 1}, {"pages": 2}]
    assert set(printed.splitlines()) == {"report COMPLETED"}


async def check_errors(names: Names, printed: str) -> None:
    assert f"# {printed.strip()}" in FRAGMENTS["errors"].text


async def check_handlers(names: Names, printed: str) -> None:
    app: FastAPI = names["app"]

    @app.get("/status")
    async def status() -> str:
        return str((await names["realtime"].get_run("run_gone")).status)

    assert (await AsgiClient(app).get("/status")).status_code == 404


async def check_inspector(names: Names, printed: str) -> None:
    assert (await AsgiClient(names["realtime"], lifespan=False).get("/inspect")).status_code == 200


async def check_inspector_session(names: Names, printed: str) -> None:
    async def with_session(scope: Any, receive: Any, send: Any) -> None:
        await names["realtime"]({**scope, "session": {"is_admin": True}}, receive, send)

    headers = {"sec-fetch-site": "same-origin"}
    assert (await AsgiClient(with_session).post("/inspect/token", headers=headers)).status_code == 200


async def check_sync(names: Names, printed: str) -> None:
    assert names["output"] == 3
    chunks = [chunk async for chunk in names["realtime"].read(names["handle"], "rows")]
    assert chunks == [{"row": 0}, {"row": 1}, {"row": 2}]


async def check_redis(names: Names, printed: str) -> None:
    assert isinstance(names["realtime"].broker, RedisBroker)


async def check_sentinel(names: Names, printed: str) -> None:
    assert isinstance(names["realtime"].broker, RedisBroker)  # tests/brokers/test_redis_faults.py uses real ones


async def check_owners(names: Names, printed: str) -> None:
    claims = [names["realtime"].verify_token(names[name]) for name in ("start", "follow")]
    assert [(one.owner, one.tags) for one in claims] == [("user:1", ("user:1",)), ("user:1", None)]


async def check_handles(names: Names, printed: str) -> None:
    assert names["realtime"].verify_token(names["handle"].public_access_token).owner == "user:1"


async def check_redact(names: Names, printed: str) -> None:
    logger = logging.getLogger("uvicorn.access")
    args = ("127.0.0.1:1", "GET", "/realtime/v1/runs?access_token=a.b.c&tags=a", "1.1", 200)
    record = logger.makeRecord(logger.name, logging.INFO, "", 0, '%s - "%s %s HTTP/%s" %d', args, None)
    added: Any = logger.filters[-1]  # a package that other tests import adds its own filter to all loggers
    logger.removeFilter(added)
    assert added.filter(record)
    assert record.getMessage() == '127.0.0.1:1 - "GET /realtime/v1/runs?access_token=REDACTED&tags=a HTTP/1.1" 200'


async def check_frontend(names: Names, printed: str) -> None:
    response = await AsgiClient(names["app"]).post("/token", query={"user": "1"})
    tokens = json.loads(response.body)
    claims = [names["realtime"].verify_token(tokens[name]) for name in ("accessToken", "triggerToken")]
    assert [(one.scopes, one.one_time) for one in claims] == [
        (("read:tags:user:1",), False),
        (("trigger:tasks:chat",), False),
    ]
    handle = await names["realtime"].trigger("chat", {"text": "Hi"})
    assert await handle.result() == {"text": "You said: Hi"}


async def check_mounts(names: Names, printed: str) -> None:
    app, path = names["app"], f"/v3/runs/{names['run'].id}"
    headers = {"authorization": f"Bearer {SECRET}"}
    for mounted in (f"/api{path}", f"/realtime/api{path}"):
        assert (await AsgiClient(app).get(mounted, headers=headers)).status_code == 200
    assert json.loads((await AsgiClient(app).get("/api/users")).body) == []


async def assert_browser_access(names: Names) -> None:
    origin = {"origin": "https://app.example"}
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,trigger-version"}
    path = "/realtime/api/v1/tasks/chat/trigger"
    preflight = await AsgiClient(names["app"]).request("OPTIONS", path, headers={**origin, **asks})
    assert preflight.status_code in (200, 204)
    assert preflight.headers["access-control-allow-headers"] == "authorization,trigger-version"
    answer = await AsgiClient(names["app"]).get("/realtime/v1/health", headers=origin)
    assert set(EXPOSED_HEADERS) <= set(answer.headers["access-control-expose-headers"].split(", "))


async def check_outermost(names: Names, printed: str) -> None:
    await assert_browser_access(names)


async def check_exposed(names: Names, printed: str) -> None:
    await assert_browser_access(names)


async def check_prefixed(names: Names, printed: str) -> None:
    for prefix in ("", "/api"):
        transport = httpx.ASGITransport(names["app"], root_path=prefix)
        async with httpx.AsyncClient(transport=transport, base_url="http://host") as http:
            url = (await http.post("/start")).json()
            assert url.startswith(f"{prefix}/realtime/v1/streams/")
            assert '"you!"' in (await http.get(url.removeprefix(prefix))).text  # the proxy strips the prefix


async def check_logs(names: Names, printed: str) -> None:
    logger = logging.getLogger("asgi_realtime")
    assert logger.isEnabledFor(logging.DEBUG)
    logger.setLevel(logging.NOTSET)


async def check_metrics(names: Names, printed: str) -> None:
    response = await AsgiClient(names["realtime"], token=SECRET).get("/realtime/v1/metrics")
    assert "asgi_realtime_subscriptions" in response.text


async def check_registry(names: Names, printed: str) -> None:
    registry = names["REGISTRY"]
    assert registry.get_sample_value("asgi_realtime_subscriptions", {"kind": "stream"}) is None  # not sampled yet
    names["realtime"].metrics.sample()
    assert registry.get_sample_value("asgi_realtime_subscriptions", {"kind": "stream"}) == 0


CHECKS: dict[str, Callable[[Names, str], Awaitable[None]]] = {
    name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")
}


def test_every_fragment_has_a_check() -> None:
    assert set(CHECKS) == set(FRAGMENTS)


@pytest.mark.asyncio
@pytest.mark.parametrize("name", FRAGMENTS)
async def test_fragment(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("fragment")
    monkeypatch.setitem(sys.modules, "fragment", module)  # its classes resolve annotations in it
    names = vars(module)
    async with Realtime(secret_key=SECRET, signals=False) as realtime:
        run = await realtime.get_run(await finished_run(realtime))
        names |= {"realtime": realtime, "run": run, "secret_key": SECRET, "tokens": tokens}
        mounted = FastAPI()
        mounted.mount("/realtime", realtime)
        names |= {"token": realtime.create_public_token(scopes={"read": {"runs": [run.id]}})}
        names |= {"FastAPI": FastAPI, "app": mounted, "Realtime": Realtime, "os": os}
        monkeypatch.setenv("REALTIME_SECRET_KEY", SECRET)
        monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:6379")
        if name in NEEDS:
            await execute(FRAGMENTS[NEEDS[name]], names)
        await execute(FRAGMENTS[name], names)
        await CHECKS[name](names, capsys.readouterr().out)


# Programs


def test_every_program_is_served_by_a_test() -> None:
    assert set(PROGRAMS) == {
        "smallest",
        "chat",
        "history",
        "sessions",
    }  # tests/e2e/test_sessions.py serves the last one
    assert set(blocks("curl")) == {"smallest"}
    assert set(blocks("browser")) == {"smallest", "follow", "page"}
    assert set(blocks("page")) == {"smallest"}


def test_the_readme_and_its_script_are_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150
    script = blocks("page")["smallest"].text.partition('<script type="module">\n')[2].partition("</script>")[0]
    assert 0 < len(script.splitlines()) <= 15


@pytest.fixture(scope="module")
def smallest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the smallest program."""
    folder = tmp_path_factory.mktemp("smallest")
    (folder / "page.html").write_text(blocks("page")["smallest"].text)
    with served(PROGRAMS["smallest"].text, folder) as url:
        yield url


def events_of(url: str, headers: dict[str, str] | None = None) -> list[Event]:
    """All events of a stream that ends, requested like an EventSource."""
    parser = EventParser()
    headers = {"accept": "text/event-stream", **(headers or {})}
    with httpx.stream("GET", url, headers=headers, timeout=GUARD_S) as response:
        assert response.status_code == 200
        return [event for body in response.iter_bytes() for event in parser.feed(body)]


@pytest.mark.slow
def test_the_curl_lines_work(smallest: str) -> None:
    if shutil.which("curl") is None:
        missing("curl is not installed")
    lines = blocks("curl")["smallest"].text.replace("localhost:8000", smallest.removeprefix("http://"))
    done = subprocess.run(["bash", "-c", lines], capture_output=True, text=True, check=True)
    parser = EventParser()
    events = parser.feed(done.stdout.encode())
    assert [json.loads(event.data) for event in events[:-1]] == WORDS
    assert (events[-1].event, events[-1].data) == ("end", '{"reason":"complete"}')


@pytest.mark.slow
def test_the_stream_of_the_smallest_program_resumes(smallest: str) -> None:
    run = httpx.post(f"{smallest}/words", timeout=GUARD_S).json()
    token = httpx.post(f"{smallest}/words/{run}/token", timeout=GUARD_S).json()
    url = f"{smallest}/realtime/v1/streams/{run}/default?access_token={token}"
    events = events_of(url)
    assert [event.id for event in events] == [str(index) for index in range(len(WORDS) + 1)]
    events = events_of(url, {"last-event-id": "5"})
    assert [json.loads(event.data) for event in events[:-1]] == WORDS[6:]
    assert httpx.get(url, headers={"last-event-id": str(len(WORDS))}, timeout=GUARD_S).status_code == 204


FOLLOW = """async () => {
    const post = async (path) => await (await fetch(path, { method: "POST" })).json();
    const id = await post("/words");
    const freshHandle = async () => ({ id, publicAccessToken: await post(`/words/${id}/token`) });
    BLOCK
    const chunks = [];
    return await new Promise((resolve) => follow({ id, publicAccessToken: "wrong" }, (chunk) => chunks.push(chunk),
        (reason) => resolve([...chunks, reason])));
}"""
"""The first token is refused, so the browser gives up and the page opens the stream again."""


@pytest.fixture
def page(smallest: str) -> Iterator[Page]:
    """A page of the smallest program, at an address without a document."""
    with launched() as browser:
        page = browser.new_page(base_url=smallest)
        page.goto("/openapi.json")
        yield page


@pytest.mark.slow
@pytest.mark.chromium
def test_the_event_sources_of_the_guide_in_chromium(page: Page) -> None:
    streams: list[str] = []
    page.on("request", lambda request: streams.append(request.url) if "/streams/" in request.url else None)
    printed: list[str] = []
    page.on("console", lambda message: printed.append(message.text) if message.type == "log" else None)
    with page.expect_console_message(lambda message: message.text == "complete", timeout=GUARD_S * 1000):
        page.evaluate(f"async () => {{ {blocks('browser')['smallest'].text} }}")
    followed = page.evaluate(FOLLOW.replace("BLOCK", blocks("browser")["follow"].text))
    assert followed == [*WORDS, "complete"]
    assert printed == [*(f"{index} {word}" for index, word in enumerate(WORDS)), "complete"]
    assert len(streams) == 3, "one of the first program; the second is refused once"


@pytest.mark.slow
@pytest.mark.server
def test_the_program_with_a_model(tmp_path: Path) -> None:
    with completions_endpoint() as environment:
        with served(PROGRAMS["chat"].text, tmp_path, {**environment, "REALTIME_SECRET_KEY": SECRET}) as url:
            handle = httpx.post(f"{url}/chat", json={"text": "Hi"}, timeout=GUARD_S).json()
            assert set(handle) == {"id", "publicAccessToken", "isCached"}
            query = f"access_token={handle['publicAccessToken']}"
            events = events_of(f"{url}/realtime/v1/streams/{handle['id']}/default?{query}")
            states = events_of(f"{url}/realtime/v1/runs/{handle['id']}?{query}")
    chunks = [json.loads(event.data) for event in events if event.event == "message"]
    assert [chunk["choices"][0]["delta"]["content"] for chunk in chunks] == ["Hel", "lo"]
    run = json.loads([event for event in states if event.event == "run"][-1].data)
    assert (run["status"], run["output"], run["metadata"]) == ("COMPLETED", {"text": "Hello"}, {"characters": 5})


@pytest.mark.slow
def test_the_documented_conformance_suite_runs(tmp_path: Path) -> None:
    (block,) = blocks("conformance").values()
    (tmp_path / "test_broker.py").write_text(block.text, "utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "retried_append", "--rootdir", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


# Facts


_SIZE = re.compile(r"(\d+(?:\.\d+)?)(?: (KiB|MiB|s|min|h))?")
_UNITS = {"": 1, "KiB": 1024, "MiB": 1024 * 1024, "s": 1, "min": 60, "h": 3600}
_ROW = re.compile(r"^\| `(Limits|Retention|Timeouts)\.(\w+)` \| ([^|]+) \|", re.MULTILINE)


def test_the_tables_of_the_configuration_have_the_defaults() -> None:
    rows = _ROW.findall((ROOT / "docs" / "configuration.md").read_text("utf-8"))
    assert {kind for kind, _, _ in rows} == {"Limits", "Retention", "Timeouts"}
    defaults = {kind.__name__: kind() for kind in (Limits, Retention, Timeouts)}
    for kind, name, text in rows:
        found = _SIZE.fullmatch(text)
        assert found, text
        assert getattr(defaults[kind], name) == float(found[1]) * _UNITS[found[2] or ""], name


def test_documented_settings_exist() -> None:
    known = {kind.__name__.lower(): {field.name for field in fields(kind)} for kind in (Limits, Retention, Timeouts)}
    for document in sorted({block.document for block in BLOCKS}):
        for kind, name in re.findall(
            r"`(limits|retention|timeouts)\.(\w+)", document.read_text("utf-8"), re.IGNORECASE
        ):
            assert any(known_name.startswith(name) for known_name in known[kind.lower()]), f"{document.name}: {name}"


def test_links_are_valid() -> None:
    for document in sorted({block.document for block in BLOCKS}):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text("utf-8")):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name}: {target}"
