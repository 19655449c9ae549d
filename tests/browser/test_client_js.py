"""The browser module: its tests in Node, its size and types, and the npm package."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

import asgi_realtime
from asgi_realtime.asgi.browser_module import SOURCE
from tests.requirements import missing, node_binary, npm_packages

ROOT = Path(__file__).parent.parent.parent
NPM = ROOT / "js"
GUARD_S = 120

pytestmark = [pytest.mark.slow, pytest.mark.server]


def run(*command: str, cwd: Path) -> str:
    """The output of a command that succeeds."""
    environment = {**os.environ, "NO_COLOR": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", sorted(path.name for path in Path(__file__).parent.glob("*.test.mjs")))
def test_in_node(name: str) -> None:
    printed = run(node_binary(), "--test-reporter=tap", name, cwd=Path(__file__).parent)  # one process, for a timeout
    assert "# fail 0" in printed and "# pass 0" not in printed


def test_it_is_small() -> None:
    assert len(gzip.compress(SOURCE.read_bytes(), 9)) < 6 * 1024


def test_its_types_are_strict() -> None:
    npm_packages(NPM)
    run("node_modules/.bin/tsc", "-p", ".", cwd=NPM)


def packed(folder: Path) -> Path:
    """The npm package as it would be published, unpacked."""
    npm_packages(NPM)
    npm = shutil.which("npm") or missing("npm is not installed (on Debian: apt-get install npm)")
    checkout = folder / "js"
    shutil.copytree(NPM, checkout, ignore=shutil.ignore_patterns("node_modules"))
    (checkout / "node_modules").symlink_to(NPM / "node_modules")
    source = folder / SOURCE.relative_to(ROOT)
    source.parent.mkdir(parents=True)
    shutil.copy(SOURCE, source)
    shutil.copy(ROOT / "LICENSE", folder)
    (packed,) = json.loads(run(npm, "pack", "--json", "--silent", cwd=checkout))
    names = {file["path"] for file in packed["files"]}
    assert names == {"LICENSE", "README.md", "client.d.ts", "client.js", "package.json"}
    with tarfile.open(checkout / packed["filename"]) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package"


USE = """
import { RealtimeError, followRun, followRuns, readStream, resumingFetch } from "asgi-realtime";

const stream = readStream<string>({ id: "run_1" }, { refreshToken: () => fetch("/token"), onGap: (gap) => gap.first });
for await (const chunk of stream) chunk.toUpperCase();
const reason: string | undefined = stream.end?.reason;
for await (const run of followRun("/run")) run.status.toUpperCase();
for await (const { runs, removed } of followRuns({ tags: ["a"] })) runs.get(removed[0])?.metadata;
const send: typeof fetch = resumingFetch({ base: "/realtime", resume: ({ headers }) => headers.get("x-rest") });
// @ts-expect-error a source is required
readStream();
// @ts-expect-error no such option
readStream("/stream", { retries: 3 });
export { reason, send, RealtimeError };
"""
"""A program in TypeScript."""


def test_the_npm_package_has_the_module_and_its_types(tmp_path: Path) -> None:
    package = packed(tmp_path)
    assert (package / "client.js").read_bytes() == SOURCE.read_bytes()
    assert json.loads((package / "package.json").read_text())["version"] == asgi_realtime.__version__

    app = tmp_path / "app"
    (app / "node_modules").mkdir(parents=True)
    package.rename(app / "node_modules" / "asgi-realtime")
    (app / "package.json").write_text('{"type": "module"}')
    (app / "use.ts").write_text(USE)
    options = ["--strict", "--noEmit", "--target", "es2022", "--module", "nodenext"]
    run(str(NPM / "node_modules/.bin/tsc"), *options, "use.ts", cwd=app)
    line = 'import("asgi-realtime").then((all) => console.log(Object.keys(all).sort().join()))'
    exported = run(node_binary(), "--eval", line, cwd=app)
    assert exported.strip() == "RealtimeError,followRun,followRuns,readStream,resumingFetch"
