"""The inspector in Chromium, in light and dark mode."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect

from tests.docs.programs import GUARD_S, served

SECRET = "a secret that is long enough for the tests"
HTML = "<img src=x onerror='document.title=1'><b>bold</b>"

PROGRAM = """
import asyncio
import os

from fastapi import FastAPI, Request

from asgi_realtime import Realtime

def authorize_inspector(request: Request) -> bool:
    return request.cookies.get("admin") == "1"

realtime = Realtime(secret_key=os.environ["REALTIME_SECRET_KEY"], authorize_inspector=authorize_inspector)
app = FastAPI(lifespan=realtime.lifespan)
app.mount("/realtime", realtime)
ends = {}

@realtime.task("chat")
async def chat():
    await asyncio.Event().wait()

@app.post("/open/{run_id}/{task}/{tag}")
async def open_run(run_id: str, task: str, tag: str):
    async def body():
        async with realtime.open_run(task, run_id=run_id, tags=[tag], metadata={"number": 1}):
            started.set()
            await ends[run_id].wait()
    started, ends[run_id] = asyncio.Event(), asyncio.Event()
    app.state.task = asyncio.create_task(body())
    await started.wait()

@app.post("/append/{run_id}")
async def append(run_id: str, request: Request):
    await realtime.append(await request.json(), run=run_id)

@app.post("/end/{run_id}")
async def end(run_id: str):
    ends[run_id].set()

@app.post("/trigger")
async def trigger():
    return (await realtime.trigger(chat)).id

@app.post("/flood")
async def flood():
    import msgspec
    record = await realtime.runs.get("flooded")
    for number in range(1000):
        realtime.recent.note(msgspec.structs.replace(record, id=f"run_{number}"))
"""

CONTRASTS = """() => {
  const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const luminance = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).map((c) => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const panel = document.querySelector("#run");
  const back = luminance(getComputedStyle(panel).backgroundColor);
  const statuses = ["QUEUED", "EXECUTING", "COMPLETED", "FAILED", "CANCELED"].map((name) => `status ${name}`);
  return Object.fromEntries([...statuses, "quiet"].map((className) => {
    const probe = Object.assign(document.createElement("span"), { className });
    panel.append(probe);
    const text = luminance(getComputedStyle(probe).color);
    return [className, (Math.max(text, back) + 0.05) / (Math.min(text, back) + 0.05)];
  }));
}"""
"""The contrast of the colors of small text with what is behind it: WCAG 2.2, 1.4.3."""

pytestmark = [pytest.mark.slow, pytest.mark.chromium]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(PROGRAM, tmp_path_factory.mktemp("inspector"), {"REALTIME_SECRET_KEY": SECRET}) as url:
        yield url


@pytest.fixture
def context(chromium: Browser) -> Iterator[BrowserContext]:
    expect.set_options(timeout=GUARD_S * 1000)
    with chromium.new_context() as context:
        yield context


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    """A page whose script must not fail, and that must not violate its policy."""
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda entry: problems.append(entry.text) if "Content Security" in entry.text else None)
    yield page
    assert problems == []


def admit(context: BrowserContext, server: str) -> None:
    context.add_cookies([{"name": "admin", "value": "1", "url": server}])


def post(page: Page, url: str, data: object = None) -> None:
    assert page.request.post(url, data=json.dumps(data), headers={"content-type": "application/json"}).ok


def test_the_secret_key_opens_it_and_is_not_stored(server: str, page: Page) -> None:
    page.goto(f"{server}/realtime/inspect")
    page.fill("#key", "not the secret key")
    page.keyboard.press("Enter")
    expect(page.locator("#denied")).to_have_text("this is not the secret key")
    page.fill("#key", SECRET)
    page.keyboard.press("Enter")
    expect(page.locator("#connection")).to_have_text("live")
    stored = "JSON.stringify([localStorage, sessionStorage, location.href, document.cookie, document.body.innerHTML])"
    assert SECRET not in page.evaluate(stored)
    assert page.input_value("#key") == ""
    page.reload()
    expect(page.locator("#login")).to_be_visible()
    expect(page.locator("main")).to_be_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_run_is_followed_live_and_shown_as_text(
    server: str, context: BrowserContext, page: Page, scheme: str
) -> None:
    admit(context, server)
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    page.goto(f"{server}/realtime/inspect/")  # with a slash at the end
    run_id = f"live_{scheme}"
    post(page, f"{server}/open/{run_id}/answer/user:1")
    page.locator(f'#rows tr[data-run="{run_id}"]').click()
    panel = page.locator("#run")
    expect(panel.locator("h2")).to_have_text(run_id)
    expect(panel).to_contain_text("EXECUTING")
    post(page, f"{server}/append/{run_id}", HTML)
    expect(panel).to_contain_text("default: 1 chunk")
    post(page, f"{server}/append/{run_id}", {"n": 1})
    chunks = panel.locator("details pre")
    expect(chunks).to_contain_text('{"n":1}')
    assert chunks.text_content() == f'{HTML}\n{{"n":1}}\n'
    assert page.locator("#run img, #run b").count() == 0 and page.title() == "Runs"
    expect(panel.locator(".steps")).to_contain_text("first chunk")
    post(page, f"{server}/end/{run_id}")
    expect(panel).to_contain_text("COMPLETED")
    expect(page.locator(f'#rows tr[data-run="{run_id}"] .status')).to_have_text("COMPLETED")
    expect(panel.locator(".steps")).to_contain_text("ended")
    expect(panel.locator("pre", has_text='"number": 1')).to_be_visible()
    contrasts = page.evaluate(CONTRASTS)
    assert min(contrasts.values()) >= 4.5, contrasts
    background = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (background == "rgb(255, 255, 255)") is (scheme == "light")


def test_filters_and_the_chosen_run_survive_a_reload(server: str, context: BrowserContext, page: Page) -> None:
    admit(context, server)
    for number, task in enumerate(("first", "second", "first")):
        post(page, f"{server}/open/filtered_{number}/{task}/tag:{number}")
    page.goto(f"{server}/realtime/inspect")
    page.select_option("[name=task]", "first")
    rows = page.locator("#rows tr")
    expect(rows).to_have_count(2)
    page.fill("[name=tag]", "tag:2")
    expect(rows).to_have_count(1)
    rows.click()
    expect(page.locator("#run h2")).to_have_text("filtered_2")
    page.reload()
    expect(page.locator("#run h2")).to_have_text("filtered_2")
    expect(rows).to_have_count(1)
    page.fill("[name=tag]", "")
    page.select_option("[name=status]", "FAILED")
    expect(rows).to_have_count(0)
    page.keyboard.press("Escape")
    expect(page.locator("#run")).to_be_hidden()


def test_a_run_is_canceled_after_a_second_click(server: str, context: BrowserContext, page: Page) -> None:
    admit(context, server)
    run_id = page.request.post(f"{server}/trigger").json()
    page.goto(f"{server}/realtime/inspect#run={run_id}")
    button = page.locator("#run button.danger")
    button.click()
    expect(button).to_have_text("Cancel this run?")
    button.click()
    expect(page.locator("#run")).to_contain_text("CANCELED")
    expect(button).to_be_hidden()


def test_a_lost_connection_is_shown_until_it_is_back(server: str, context: BrowserContext, page: Page) -> None:
    admit(context, server)
    page.goto(f"{server}/realtime/inspect")
    state = page.locator("#connection")
    expect(state).to_have_text("live")
    context.set_offline(True)
    expect(state).to_contain_text("not connected")
    context.set_offline(False)
    expect(state).to_have_text("live")


def test_the_page_says_when_it_shows_a_sample(server: str, context: BrowserContext, page: Page) -> None:
    admit(context, server)
    post(page, f"{server}/open/flooded/flood/tag:flood")
    page.goto(f"{server}/realtime/inspect")
    expect(page.locator("#sample")).to_have_text(re.compile(r"^\d+ runs?$"))
    post(page, f"{server}/flood")
    expect(page.locator("#sample")).to_contain_text("the newest 100 of 1000 runs. This is a sample")
    page.fill("[name=tag]", "tag:flood")
    expect(page.locator("#sample")).to_have_text("1 run")
