"""The TypeScript of the documents: type-checked, strictly, against the real packages, and what can run is run."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest

from tests.docs.blocks import ROOT, blocks
from tests.docs.programs import GUARD_S, served
from tests.docs.test_chat import BLOCKS as CHAT
from tests.docs.test_recipes import browser, chat_of, pydantic_ai
from tests.requirements import node_binary, npm_packages

if TYPE_CHECKING:
    from playwright.sync_api import Browser

__all__ = ["browser"]  # a fixture

pytestmark = [pytest.mark.slow, pytest.mark.server]

BLOCKS = blocks("tsx")
REQUIRE = "import { createRequire } from 'node:module'; const require = createRequire(import.meta.url);"
"""For the CommonJS packages in a bundle."""
CLIENT_JS = ROOT / "asgi_realtime/asgi/client.js"

PARTS = """
import type { UIMessage } from "ai";

export type Message = UIMessage<unknown, { progress: { done: number; of: number } }>;
export const Parts = ({ message }: { message: Message }) => <>BLOCK</>;
"""

NEXT_ROUTE = """
import { generateId, streamText } from "ai";
import type { ResumableStreamContext } from "./resumable-stream";

declare const result: ReturnType<typeof streamText>;
declare const context: ResumableStreamContext, chatId: string;
declare function saveActiveStream(chatId: string, streamId: string): Promise<void>;
export const route = () => {
BLOCK
};
"""

RESUMABLE_STREAM = """
export interface ResumableStreamContext {
  createNewResumableStream(id: string, make: () => ReadableStream<string>): Promise<ReadableStream<string> | null>;
}
"""
"""What we use of the package, whose types are not among those of the tests."""

STOP = "export const Stop = ({ id }: { id: string }) => BLOCK;"

FRAMES = {
    "react_app": {"hooks": "BLOCK", "from_trigger_dev": "BLOCK"},
    "usechat_app": {"chat_page": "BLOCK", "tool_progress": PARTS, "from_resumable_stream": NEXT_ROUTE, "stop": STOP},
}
"""The blocks by the example whose packages they use, each with the code around it."""


def project(folder: Path, app: str) -> dict[str, Path]:
    """Write the blocks of an app into a folder that has its packages. Returns their files."""
    node_binary()
    packages = npm_packages(ROOT / "examples" / app)
    (folder / "node_modules").symlink_to(packages / "node_modules")
    (folder / "src").mkdir()
    (folder / "src/resumable-stream.ts").write_text(RESUMABLE_STREAM)
    config = json.loads((packages / "tsconfig.json").read_text())
    config["compilerOptions"] |= {"allowJs": True, "paths": {"asgi-realtime": [str(CLIENT_JS)]}}
    (folder / "tsconfig.json").write_text(json.dumps(config))
    files = {name: folder / f"src/{name}.tsx" for name in FRAMES[app]}
    for name, file in files.items():
        file.write_text(FRAMES[app][name].replace("BLOCK", BLOCKS[name].text), "utf-8")
    return files


def bundle(folder: Path, script: str, *options: str) -> Path:
    (folder / "src/main.tsx").write_text(script)
    command = ["node_modules/.bin/esbuild", "src/main.tsx", "--bundle", "--jsx=automatic", "--log-level=warning"]
    command += [f"--alias:asgi-realtime={CLIENT_JS}", '--define:process.env.NODE_ENV="production"', *options]
    done = subprocess.run([*command, "--outfile=main.js"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "main.js"


def test_every_block_is_checked() -> None:
    assert sorted(BLOCKS) == sorted(name for frames in FRAMES.values() for name in frames)


@pytest.mark.parametrize("app", FRAMES)
def test_the_blocks_have_no_type_errors(app: str, tmp_path: Path) -> None:
    project(tmp_path, app)
    done = subprocess.run(["node_modules/.bin/tsc"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.asyncio
@pytest.mark.filterwarnings("ignore")
async def test_the_progress_of_a_tool_is_shown_in_its_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project(tmp_path, "usechat_app")
    script = """
        import { readUIMessageStream } from "ai";
        import { readFileSync } from "node:fs";
        import { renderToStaticMarkup } from "react-dom/server";
        import { Parts } from "./tool_progress";

        const stream = ReadableStream.from(JSON.parse(readFileSync(0, "utf-8")));
        for await (const message of readUIMessageStream({ stream })) {
          console.log(renderToStaticMarkup(Parts({ message })));
        }
    """
    program = bundle(tmp_path, script, "--platform=node", "--format=esm", "--banner:js=" + REQUIRE)
    async with chat_of(pydantic_ai("tool_progress", monkeypatch), "Find it") as parts:
        command = [node_binary(), str(program.rename(tmp_path / "main.mjs"))]
        done = await anyio.run_process(command, input=json.dumps(parts).encode())
    shown = list(dict.fromkeys(filter(None, done.stdout.decode().splitlines())))
    assert shown == [f'<progress value="{number}" max="3"></progress>' for number in (1, 2, 3)]


MODEL = """
import asyncio

async def model(messages):
    yield "Hel"
    while messages[-1]["parts"][0]["text"] == "wait":
        await asyncio.sleep(0.01)
    yield "lo"
"""

PAGE = """
from starlette.staticfiles import StaticFiles

app.mount("/", StaticFiles(directory=".", html=True))
"""


@pytest.fixture
def chat_url(tmp_path: Path) -> Iterator[str]:
    """The page of docs/chat.md, served by its FastAPI program."""
    project(tmp_path, "usechat_app")
    bundle(
        tmp_path,
        """
        import { createRoot } from "react-dom/client";
        import { Chat } from "./chat_page";

        createRoot(document.body).render(<Chat id="c1" />);
        """,
        "--format=esm",
    )
    (tmp_path / "index.html").write_text('<body></body><script type="module" src="main.js"></script>')
    program = "".join([CHAT["shared"].text, MODEL, CHAT["fastapi"].text, PAGE])
    with served(program, tmp_path, {"REALTIME_SECRET_KEY": "a secret that is long enough for the tests"}) as url:
        yield url


@pytest.mark.chromium
def test_the_chat_page_asks_resumes_and_stops(chat_url: str, browser: Browser) -> None:
    page = browser.new_page()
    page.set_default_timeout(GUARD_S * 1000)
    page.goto(chat_url)

    def ask(text: str) -> None:
        page.fill("input", text)
        page.click("text=Send")

    ask("Hi")
    page.wait_for_function("document.querySelectorAll('p')[1]?.textContent === 'Hello'")
    ask("wait")
    page.wait_for_function("document.querySelectorAll('p')[3]?.textContent === 'Hel'")
    page.reload()
    page.wait_for_function("document.querySelector('p')?.textContent === 'Hel'")
    page.click("text=Stop")
    page.wait_for_function("fetch('/api/chat/c1/stream').then(({ status }) => status === 204)")
    page.close()
