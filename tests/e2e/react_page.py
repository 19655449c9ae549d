"""The React example as users run it: built by `npm run build`, served by `vite preview` on a separate origin."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.requirements import node_binary, npm_packages

APP = Path(__file__).parent.parent.parent / "examples" / "react_app"
REALTIME_URL = "https://realtime.example/realtime"
"""A placeholder in the build for the URL of the server, which is not known at build time."""


def build(folder: Path, *, source: Path = APP) -> Path:
    """Type-check the page and build it into `folder`."""
    node_binary()
    npm_packages(APP)
    command = ["npm", "run", "build", "--", "--outDir", str(folder), "--emptyOutDir"]
    _run(command, source, {"VITE_REALTIME_URL": REALTIME_URL})
    return folder


def build_beside(folder: Path, *, source: Path) -> Path:
    """Build a page that uses the packages of the example."""
    node_binary()
    npm_packages(APP)
    copy = shutil.copytree(source, folder / "source")
    (copy / "node_modules").symlink_to(APP / "node_modules")
    _run([str(_vite()), "build", "--outDir", str(folder / "built")], copy, {})
    return folder / "built"


@contextmanager
def served(built: Path, folder: Path, backend_url: str) -> Iterator[str]:
    """Serve the build, with a server as its backend. Yields the URL of the page."""
    copy = shutil.copytree(built, folder / "page")
    for script in copy.glob("assets/*.js"):
        script.write_text(script.read_text().replace(REALTIME_URL, f"{backend_url}/realtime"))
    command = [str(_vite()), "preview", "--outDir", str(copy), "--port", "0", "--host", "127.0.0.1"]
    with subprocess.Popen(
        command,
        cwd=APP,
        env={**os.environ, "BACKEND_URL": backend_url, "NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            printed = ""
            while (found := re.search(r"http://[\d.:]+", printed)) is None:
                line = process.stdout.readline()
                assert line, f"vite preview ended: {printed}"
                printed += line
            yield found[0]
        finally:
            process.kill()


def _vite() -> Path:
    return APP / "node_modules" / ".bin" / "vite"


def _run(command: list[str], folder: Path, environment: Mapping[str, str]) -> None:
    done = subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
