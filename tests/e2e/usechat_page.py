"""The page with `useChat` of the AI SDK, in versions 5, 6 and 7: its build, and a chat on an open page."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from playwright.sync_api import Page

from tests.e2e.answers import active_run
from tests.e2e.node import FRONTENDS
from tests.e2e.site import GUARD_S, Opened, Site
from tests.requirements import node_binary, npm_packages


def build(folder: Path) -> Path:
    """Bundle the pages into `folder`."""
    node_binary()
    npm_packages(FRONTENDS)
    pages = FRONTENDS / "page"
    scripts = sorted(map(str, pages.glob("ai*.js")))
    options = ["--bundle", "--format=esm", '--define:process.env.NODE_ENV="production"', "--log-level=warning"]
    command = [str(FRONTENDS / "node_modules/.bin/esbuild"), *scripts, *options, f"--outdir={folder}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.copy(pages / "index.html", folder)
    return folder


class Chat:
    """`useChat` on an open page. `chat` in the page is what the hook returned last."""

    def __init__(self, page: Page, site: Site, version: str, id: str) -> None:
        self.page = page
        self.id = id
        self.origin = site.origin
        self._site = site
        self._version = version
        page.set_default_timeout(GUARD_S * 1000)

    def open(self, **options: Any) -> None:
        options = {"id": self.id, **options}
        self.page.goto(f"{self.origin}/page/?version={self._version}&options={json.dumps(options)}")
        self.page.wait_for_selector("pre", state="attached")

    def send(self, text: str = "Hello", **body: Any) -> Opened:
        """Send a message, and return the run that answers."""
        self.page.evaluate("([text, body]) => void chat.sendMessage({ text }, { body })", [text, body])
        return active_run(self._site, self.id)

    def until(self, condition: str) -> dict[str, Any]:
        """Wait until the chat fulfills a condition. Returns its messages, status and error."""
        try:
            self.page.wait_for_function(f"() => {{ const {{ status, error, messages }} = chat; return {condition}; }}")
        except Exception as exc:
            raise AssertionError(f"never {condition}: {self.page.inner_text('pre')}") from exc
        state: dict[str, Any] = json.loads(self.page.inner_text("pre"))
        return state

    def until_text(self, text: str, *, streams: bool = False) -> dict[str, Any]:
        """Wait until the last message has this text, and, if `streams`, until the chat receives the rest of it."""
        texts = "messages.at(-1)?.parts.map((part) => part.text ?? '').join('')"
        return self.until(f"{texts} === {json.dumps(text)}" + " && status === 'streaming'" * streams)
