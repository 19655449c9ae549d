"""The programs of docs/recipes, in this process, and the scripts of their pages in Chromium."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import types
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from starlette.requests import Request
from starlette.testclient import TestClient

from asgi_realtime.testing import AsgiClient
from tests.chromium import launched
from tests.docs.blocks import BLOCKS, ROOT, blocks
from tests.docs.programs import GUARD_S, completions_endpoint, served
from tests.inprocess import until
from tests.models import test_parts_langchain as langchain_
from tests.models.needs import need

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

RECIPES = blocks("recipe")
SCRIPTS = blocks("script")
SECRETS = dict.fromkeys(("REALTIME_SECRET_KEY", "SESSION_SECRET_KEY"), "a secret that is long enough for the tests")
LONGEST = 75
"""Lines of a recipe: a screen."""


def test_recipes_are_listed_and_short() -> None:
    pages = set((ROOT / "docs" / "recipes").glob("*.md"))
    index = ROOT / "docs" / "recipes" / "README.md"
    listed = {
        index.parent / line.split("](")[1].split(")")[0] for line in index.read_text().splitlines() if "](" in line
    }
    assert {page for page in listed if page.parent == index.parent} == pages - {index}
    assert {page.name: lines for page in pages if (lines := len(page.read_text().splitlines())) > LONGEST} == {}
    assert {block.document for block in BLOCKS if block.kind in ("recipe", "script")} == pages - {index}


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a recipe as a module."""
    for variable, value in {"OPENAI_API_KEY": "none", **SECRETS}.items():
        if variable not in os.environ:
            monkeypatch.setenv(variable, value)
    module = types.ModuleType(f"recipe_{name}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    block = RECIPES[name]
    source = "\n" * (block.line - 1) + block.text
    exec(compile(source, str(block.document), "exec", dont_inherit=True), vars(module))
    return module


async def chunks_of(client: AsgiClient, handle: dict[str, str], stream: str = "default") -> list[Any]:
    path = f"/realtime/v1/streams/{handle['id']}/{stream}"
    async with client.stream(path, token=handle["publicAccessToken"]) as response:
        events = await response.read_all_events()
    return [event.json() for event in events if event.event == "message"]


@asynccontextmanager
async def chat_of(recipe: Any, question: str) -> AsyncIterator[list[dict[str, Any]]]:
    """The parts that `useChat` gets as the answer to a question."""
    message = {"role": "user", "parts": [{"type": "text", "text": question}]}
    async with AsgiClient(recipe.app) as client:
        response = await client.post("/api/chat", json={"id": "chat", "messages": [message]})
        lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
        yield [json.loads(line) for line in lines]


def text_of(parts: list[dict[str, Any]]) -> str:
    return "".join(part["delta"] for part in parts if part["type"] == "text-delta")


@pytest.mark.asyncio
async def test_text_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with completions_endpoint() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        recipe = load("text_only", monkeypatch)
        async with recipe.openai, AsgiClient(recipe.app) as client:
            handle = (await client.post("/answers", query={"question": "Hi"})).json()
            assert await chunks_of(client, handle) == ["Hel", "lo"]


@pytest.mark.asyncio
async def test_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load("stop", monkeypatch)
    async with AsgiClient(recipe.app) as client:
        handle = (await client.post("/answers", query={"question": "Why"})).json()
        path = f"/realtime/v1/streams/{handle['id']}/default"
        async with client.stream(path, token=handle["publicAccessToken"]) as response:
            first = await response.next_event()
            assert (await client.post(f"/answers/{handle['id']}/stop")).status_code == 204
            events = [first, *await response.read_all_events()]
    assert events[-1].json() == {"reason": "canceled"}
    (saved,) = recipe.saved.values()
    assert saved["parts"][0]["text"] == "".join(event.json() for event in events[:-1])


@pytest.mark.asyncio
async def test_chat_with_history(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load("chat_with_history", monkeypatch)
    may_end, may_save = asyncio.Event(), asyncio.Event()
    message = recipe.RunEnd.message

    async def message_of(end: Any) -> Any:
        if end.run.payload["thread"] == "ada:c" and end.run.payload["messages"][-1]["id"] == "q1":
            await may_save.wait()
        return await message(end)

    monkeypatch.setattr(recipe.RunEnd, "message", message_of)

    async def model(messages: list[Any]) -> AsyncIterator[str]:
        yield f"{len(messages)}"
        await may_end.wait()

    async def login(user: str, request: Request) -> None:
        request.session["user"] = user

    recipe.app.add_api_route("/login/{user}", login, methods=["POST"])
    recipe.model = model
    recipe.answer.concurrency_limit = 1
    async with AsgiClient(recipe.app) as client:
        ada, bob = [
            {"cookie": (await client.post(f"/login/{user}")).headers["set-cookie"].split(";")[0]}
            for user in ("ada", "bob")
        ]

        def ask(id: str, chat: str) -> dict[str, Any]:
            message = {"id": id, "role": "user", "parts": [{"type": "text", "text": "Why?"}]}
            return {"json": {"id": chat, "message": message}, "headers": ada}

        async def history(user: dict[str, str], chat: str) -> list[tuple[str, Any]]:
            messages = (await client.get(f"/api/chat/{chat}", headers=user)).json()
            return [(one["id"], one.get("metadata", {}).get("status")) for one in messages]

        assert (await client.post("/api/chat", json={"id": "c"})).status_code == 403
        assert (await client.post("/api/chat", **ask("q", "x:c"))).status_code == 403
        async with client.stream("/api/chat", method="POST", **ask("q1", "c")) as first:
            await first.next_event()
            assert (await client.post("/api/chat", **ask("q2", "c"))).status_code == 409
            for headers, status in ((ada, 200), (bob, 204)):
                async with client.stream("/api/chat/c/stream", headers=headers) as resumed:
                    assert resumed.status_code == status
            assert (await client.post("/api/chat/c/stop", headers=bob)).status_code == 204
            assert (await history(ada, "c"), await history(bob, "c")) == ([("q1", None)], [])

            async with client.stream("/api/chat", method="POST", **ask("q3", "queued")):
                await client.post("/api/chat/queued/stop", headers=ada)
                await until(lambda: all(recipe.chats["ada:queued"].values()))
            assert [status for _, status in await history(ada, "queued")] == [None, "CANCELED"]
            assert (await history(ada, "queued"))[0] == ("q3", None)

            may_end.set()
            await first.read_all_events()
        second = await client.post("/api/chat", **ask("q4", "c"))  # the thread is free, and the answer not yet saved
        assert '"delta":"2"' in second.text.replace(" ", "")
        may_save.set()
        await until(lambda: all(recipe.chats["ada:c"].values()))
        stored = await history(ada, "c")
        assert ([id for id, _ in stored[::2]], [status for _, status in stored[1::2]]) == (
            ["q1", "q4"],
            ["COMPLETED"] * 2,
        )


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("body", "seen"),
    [
        (b"name,age\nAda,36\nAlan,41\n", ({"progress": 1}, {"rows": 2})),
        (b"name,age\nAda,36\n,1\n", ({"progress": 0.5}, None)),
    ],
)
async def test_progress_bar(body: bytes, seen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load("progress_bar", monkeypatch)
    async with AsgiClient(recipe.app) as client:
        handle = (await client.post("/imports", body=body)).json()
        states = [state async for state in recipe.realtime.subscribe_to_run(handle["id"])]
    assert (states[-1].metadata, states[-1].output) == seen
    assert recipe.people[0] == {"name": "Ada", "age": "36"}
    if seen[1] is None:
        assert states[-1].error.message == "Row 2 has no name."


@pytest.mark.asyncio
async def test_progress_bar_stops_and_rejects_other_encodings(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load("progress_bar", monkeypatch)
    may_continue = threading.Event()

    class People(list[dict[str, str]]):
        def append(self, row: dict[str, str]) -> None:
            super().append(row)
            assert may_continue.wait(GUARD_S)

    recipe.people = People()
    async with AsgiClient(recipe.app) as client:
        rejected = await client.post("/imports", body="name\nJosé\n".encode("latin-1"))
        assert (rejected.status_code, rejected.json()) == (400, {"detail": "Save the file as UTF-8."})
        handle = (await client.post("/imports", body="\ufeffname\nAda\nAlan\n".encode())).json()
        await until(lambda: recipe.people)
        assert (await client.post(f"/imports/{handle['id']}/stop")).status_code == 204
        states = [state async for state in recipe.realtime.subscribe_to_run(handle["id"])]
        may_continue.set()
    assert (states[-1].status, recipe.people) == ("CANCELED", [{"name": "Ada"}])


def pydantic_ai(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    need("pydantic_ai")
    recipe = load(name, monkeypatch)
    recipe.agent.model = need("pydantic_ai.models.test").TestModel(custom_output_text="Sunny.")
    return recipe


@pytest.mark.asyncio
@pytest.mark.filterwarnings("ignore")
async def test_tool_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    async with chat_of(pydantic_ai("tool_progress", monkeypatch), "Find it") as parts:
        assert [part["data"]["done"] for part in parts if part["type"] == "data-progress"] == [1, 2, 3]
        assert [part["type"] for part in parts].index("tool-output-available") > 0
        assert text_of(parts) == "Sunny."


@pytest.mark.asyncio
@pytest.mark.filterwarnings("ignore")
async def test_pydantic_ai(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = pydantic_ai("pydantic_ai", monkeypatch)
    async with chat_of(recipe, "How is the weather?") as parts:
        outputs = [part["output"] for part in parts if part["type"] == "tool-output-available"]
        assert (outputs, text_of(parts), parts[-1]["type"]) == (["Sunny in a"], "Sunny.", "finish")
        assert (await AsgiClient(recipe.app).get("/api/chat/chat/stream")).status_code == 204


@pytest.mark.asyncio
@pytest.mark.filterwarnings("ignore")
async def test_langgraph(monkeypatch: pytest.MonkeyPatch) -> None:
    need("langgraph.graph")
    model = types.ModuleType("chat_model")
    vars(model)["model"] = langchain_.model([langchain_.said("Hel"), langchain_.said("lo")])
    monkeypatch.setitem(sys.modules, "chat_model", model)
    async with chat_of(load("langgraph", monkeypatch), "Hi") as parts:
        assert [part["data"] for part in parts if part["type"] == "data-status"] == ["writing"]
        assert text_of(parts) == "Hello"


@pytest.mark.asyncio
async def test_session_cookie(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load("session_cookie", monkeypatch)
    async with AsgiClient(recipe.app) as client:
        cookies = []
        for user in ("ada", "bob"):
            login = await client.post(f"/login/{user}")
            cookies.append(login.headers["set-cookie"].split(";")[0])
        own = {"cookie": cookies[0], "sec-fetch-site": "same-origin"}
        run_id = (await client.post("/answers", query={"question": "Why"}, headers=own)).json()
        path = f"/realtime/v1/streams/{run_id}/default"
        assert (await client.get(path)).status_code == 401
        assert (await client.get(path, headers={**own, "cookie": cookies[1]})).status_code == 403
        async with client.stream(path, headers=own) as response:
            assert "".join(event.json() for event in (await response.read_all_events())[:-1]) == "Why, you ask? "


@pytest.mark.asyncio
async def test_from_sse_starlette(monkeypatch: pytest.MonkeyPatch) -> None:
    need("sse_starlette")
    async with AsgiClient(load("before_sse_starlette", monkeypatch).app) as client:
        async with client.stream("/words") as response:
            before = [event.json() for event in await response.read_all_events()]
    async with AsgiClient(load("after_sse_starlette", monkeypatch).app) as client:
        path = f"/words/{(await client.post('/words')).json()}"
        async with client.stream(path) as response:
            *after, end = await response.read_all_events()
        async with client.stream(path, last_event_id="0") as response:
            resumed = await response.read_all_events()
    assert [event.json() for event in after] == before == ["one", "two", "three"]
    assert [(event.id, event.data) for event in resumed] == [(event.id, event.data) for event in [*after[1:], end]]


@pytest.mark.asyncio
async def test_many_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    async with AsgiClient(load("many_streams", monkeypatch).app) as client:
        chunks = await chunks_of(client, (await client.post("/panels", query={"question": "Why?"})).json())
    texts = {name: "".join(chunk["text"] for chunk in chunks if chunk["name"] == name) for name in ("poet", "editor")}
    assert texts == {"poet": "Why? I am the poet. ", "editor": "Why? I am the editor. "}
    assert [chunk["name"] for chunk in chunks[:3]] == ["poet", "critic", "editor"], "side by side"


def test_websocket_bridge(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load("websocket_bridge", monkeypatch)
    with TestClient(recipe.app) as client:
        run_id = client.post("/greetings").json()
        with client.websocket_connect(f"/runs/{run_id}") as websocket:
            assert websocket.receive_json() == {"index": 0, "chunk": "Who are you?"}
        with client.websocket_connect(f"/runs/{run_id}?after=0") as websocket:
            websocket.send_json("Ada")
            assert websocket.receive_json() == {"index": 1, "chunk": "Hello Ada!"}
            assert websocket.receive() == {"type": "websocket.close", "code": 1000, "reason": ""}

        canceled = client.post("/greetings").json()
        with client.websocket_connect(f"/runs/{canceled}?after=0") as websocket:
            recipe.realtime.sync.cancel(canceled)
            assert websocket.receive()["code"] == 4000


@pytest.mark.asyncio
async def test_from_resumable_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    with completions_endpoint() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        recipe = load("from_resumable_stream", monkeypatch)
        async with recipe.openai, chat_of(recipe, "Hi") as parts:
            assert (text_of(parts), parts[-1]["type"]) == ("Hello", "finish")
            client = AsgiClient(recipe.app)
            assert (await client.get("/api/chat/chat/stream")).status_code == 204
            assert (await client.post("/api/chat/chat/stop")).status_code == 204


@pytest.mark.asyncio
async def test_from_trigger_dev(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load("from_trigger_dev", monkeypatch)
    async with AsgiClient(recipe.app) as client:
        handle = (await client.post("/summaries", json={"url": "https://example.com"})).json()
        await recipe.realtime.result(handle["id"])
        path = f"/realtime/api/v3/runs/{handle['id']}"  # what the hooks and the SDK request
        run = (await client.get(path, token=handle["publicAccessToken"])).json()
    assert (run["status"], run["output"]) == ("COMPLETED", {"text": "Summary of https://example.com"})
    assert (run["metadata"], run["tags"]) == ({"progress": 0.5}, ["user:1"])


# Scripts

PAGE = """
from fastapi.responses import HTMLResponse

@app.get("/", response_class=HTMLResponse)
def page():
    return '''<!doctype html>
<p id="output"></p><button id="button">Stop</button><progress id="bar"></progress><input type="file" id="file">
<script type="module">{script}</script>'''
"""


@pytest.fixture
def browser() -> Iterator[Browser]:
    """One for each test: while it is open, Playwright's event loop runs in this thread, and no other can."""
    with launched() as browser:
        yield browser


def use_text_only(page: Page) -> None:
    wait_for(page, "output.textContent === 'Hello'")


def use_stop(page: Page) -> None:
    wait_for(page, "output.textContent.startsWith('Why 0, Why 1, ')")
    page.click("#button")
    wait_for(page, "button.hidden")
    assert page.inner_text("#output").startswith("Why 0, Why 1, ")


def use_progress_bar(page: Page) -> None:
    wait_for(page, "file.onchange !== null")
    page.set_input_files("#file", {"name": "a.csv", "mimeType": "text/csv", "buffer": b"name\nAda\nAlan\n"})
    wait_for(page, "output.textContent === '2 rows'")
    assert page.evaluate("bar.value") == 1
    page.set_input_files("#file", {"name": "b.csv", "mimeType": "text/csv", "buffer": b"name\nJos\xe9\n"})
    wait_for(page, "output.textContent === 'Save the file as UTF-8.'")


def use_session_cookie(page: Page) -> None:
    wait_for(page, "output.textContent === 'Why, you ask? '")


def use_many_streams(page: Page) -> None:
    wait_for(page, "output.textContent.split('.').length === 4")
    texts = page.evaluate("[...output.children].map((column) => column.textContent)")
    assert texts == [f"Why? I am the {name}. " for name in ("poet", "critic", "editor")]


USES = {name.removeprefix("use_"): use for name, use in globals().items() if name.startswith("use_")}


def wait_for(page: Page, condition: str) -> None:
    page.wait_for_function(condition, timeout=GUARD_S * 1000)


def test_every_recipe_and_script_is_used() -> None:
    tests = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    recipes = {f"from_{name.partition('_')[2]}" if name.startswith(("before_", "after_")) else name for name in RECIPES}
    assert recipes <= tests
    assert set(USES) == set(SCRIPTS)


@pytest.mark.slow
@pytest.mark.chromium
@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name: str, browser: Browser, tmp_path: Path) -> None:
    program = RECIPES[name].text + PAGE.replace("{script}", SCRIPTS[name].text)
    with completions_endpoint() as environment, served(program, tmp_path, {**environment, **SECRETS}) as url:
        page = browser.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        USES[name](page)
        page.close()
    assert errors == []
