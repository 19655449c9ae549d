"""The program of the guide whose sessions replace tokens, with Chromium and its cookies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from tests.docs.blocks import blocks
from tests.docs.programs import served

SECRET = "a secret that is long enough for the tests"

ROUTES = """
from asgi_realtime import RealtimeError, realtime_error_handler
from fastapi.responses import HTMLResponse

app.add_exception_handler(RealtimeError, realtime_error_handler)

@realtime.task("forever")
async def forever():
    await realtime.append("Hello")
    await __import__("asyncio").Event().wait()

@app.get("/", response_class=HTMLResponse)
def page():
    return "<!doctype html>"

@app.post("/login/{user}")
async def login(user: str, request: Request):
    request.session["user"] = user
    handle = await realtime.trigger(forever, tags=[f"user:{user}"])
    return handle.id

@app.get("/status/{run_id}")
async def status(run_id: str):
    return (await realtime.get_run(run_id)).status
"""

READ = """(path) => new Promise((resolve) => {
  const source = new EventSource(path);
  const close = (result) => { source.close(); resolve(result); };
  source.onmessage = (event) => close(JSON.parse(event.data));
  source.onerror = () => close("error");
})"""

READ_WITH_MODULE = """async (id) => {
  const { readStream } = await import("/realtime/client.js");
  for await (const chunk of readStream({ id })) return chunk;
}"""

CANCEL = """async (url) => {
  const request = { method: "POST", credentials: "include", mode: MODE };
  return (await fetch(url, request).catch(() => ({ status: "blocked" }))).status;
}"""

pytestmark = [pytest.mark.slow, pytest.mark.chromium]


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Two origins of one site: they differ in the port only, so the browser sends the cookie to both."""
    program = blocks("program")["sessions"].text.replace(
        "authorize=authorize", "authorize=lambda *asked: (grant := authorize(*asked)) and Grant(owner=grant.owner)"
    )
    environment = {"REALTIME_SECRET_KEY": SECRET, "SESSION_SECRET_KEY": SECRET}
    folders = [tmp_path / "own", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
    texts = [blocks("program")["sessions"].text + ROUTES, program + ROUTES]
    with served(texts[0], folders[0], environment) as reading, served(texts[1], folders[1], environment) as changing:
        yield reading, changing


@pytest.fixture
def page(chromium: Browser) -> Iterator[Page]:
    with chromium.new_page() as page:
        yield page


def test_a_page_reads_with_its_cookie_and_no_token(servers: tuple[str, str], page: Page) -> None:
    reading, _ = servers
    page.goto(reading)
    run_id = page.request.post(f"{reading}/login/1").json()
    stream = f"/realtime/v1/streams/{run_id}/default"
    assert page.evaluate(READ, stream) == "Hello"
    assert page.evaluate(READ_WITH_MODULE, run_id) == "Hello"
    page.request.post(f"{reading}/login/2")
    assert page.evaluate(READ, stream) == "error", "the run is not tagged with the second user"
    page.context.clear_cookies()
    assert page.evaluate(READ, stream) == "error"
    assert page.request.get(f"{reading}/status/run_gone").status == 404


def test_a_page_of_another_origin_cannot_use_the_cookie(servers: tuple[str, str], page: Page) -> None:
    reading, changing = servers
    run_id = page.request.post(f"{changing}/login/1").json()
    cancel = f"{changing}/realtime/api/v2/runs/{run_id}/cancel"
    page.goto(reading)
    assert page.evaluate(CANCEL.replace("MODE", '"cors"'), cancel) == "blocked"
    assert page.evaluate(CANCEL.replace("MODE", '"no-cors"'), cancel) == 0
    page.set_content(f'<form method=post action="{cancel}"></form>')
    with page.expect_response(cancel) as rejected:
        page.evaluate("document.forms[0].submit()")
    page.wait_for_url(cancel)  # otherwise the next navigation can interrupt this one
    assert rejected.value.status == 403
    assert "session=" in rejected.value.request.all_headers()["cookie"]
    assert page.request.get(f"{changing}/status/{run_id}").json() == "EXECUTING"
    page.goto(changing)
    assert page.evaluate(CANCEL.replace("MODE", '"cors"'), cancel) == 200
    page.wait_for_function(
        "async (url) => (await (await fetch(url)).json()) === 'CANCELED'", arg=f"{changing}/status/{run_id}"
    )
