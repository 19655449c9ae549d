"""`make release-check`: builds the distributions, checks them, and uses the wheel like a new user.

The wheel is installed into a clean environment, with what the README says, and the README's first program runs on it.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "asgi_realtime"
WORDS = ["Each", "word", "is", "sent", "as", "soon", "as", "it", "is", "produced."]
GUARD_S = 60.0


def main() -> None:
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    run(sys.executable, "-m", "hatchling", "build", "-d", str(dist))
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    run(sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist))
    check_wheel(wheel)
    check_sdist(sdist)
    with tempfile.TemporaryDirectory() as folder:
        check_program(wheel, Path(folder))
    say(f"{wheel.name} and {sdist.name} are ready")


def check_wheel(wheel: Path) -> None:
    """The package as git has it, the pytest plugin, the metadata and the license, and nothing else."""
    names = set(zipfile.ZipFile(wheel).namelist())
    version = re.search(r'^__version__ = "(.+)"', (PACKAGE / "__init__.py").read_text("utf-8"), re.MULTILINE)
    assert version
    metadata = f"asgi_realtime-{version[1]}.dist-info/"
    wanted = {*tracked("asgi_realtime"), "asgi_realtime_pytest.py"}
    wanted |= {metadata + name for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    assert {"asgi_realtime/py.typed", "asgi_realtime/asgi/client.js"} <= wanted
    expect_equal(names, wanted, "the wheel")


def check_sdist(sdist: Path) -> None:
    """Only files of git, and what the build backend adds."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    stray = names - set(tracked(".")) - {"PKG-INFO"}
    if stray:
        fail(f"the sdist has files that git does not: {sorted(stray)}")
    missing = {*tracked("asgi_realtime"), "LICENSE", "README.md"} - names
    if missing:
        fail(f"the sdist lacks {sorted(missing)}")


def check_program(wheel: Path, folder: Path) -> None:
    """Install the wheel into a clean environment and read the stream of the README's first program."""
    venv.create(folder / "env", with_pip=True)
    python = str(folder / "env/bin/python")
    run(python, "-m", "pip", "install", "--quiet", str(wheel), "fastapi", "uvicorn[standard]")
    run(python, "-m", "pip", "check")
    (folder / "app.py").write_text(first_program(), "utf-8")
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port = bound.getsockname()[1]
    server = subprocess.Popen([python, "-m", "uvicorn", "app:app", "--port", str(port)], cwd=folder)
    try:
        check_stream(f"http://127.0.0.1:{port}", server)
    finally:
        server.terminate()
        server.wait(GUARD_S)


def first_program() -> str:
    found = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert found
    return found[1]


def check_stream(address: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + GUARD_S
    while True:
        try:
            run = post(f"{address}/words")
        except urllib.error.URLError as exc:
            if server.poll() is not None or time.monotonic() > deadline:
                fail(f"the README's first program does not start: {exc}")
            time.sleep(0.1)
        else:
            break
    headers = {"authorization": f"Bearer {post(f'{address}/words/{run}/token')}"}
    stream = urllib.request.Request(f"{address}/realtime/v1/streams/{run}/default", headers=headers)
    sent = re.findall(r'^data: "(.*)"$', read(stream), re.MULTILINE)
    if sent != WORDS:
        fail(f"the README's first program sent {sent}")


def post(url: str) -> str:
    return str(json.loads(read(urllib.request.Request(url, method="POST"))))


def read(request: urllib.request.Request) -> str:
    with urllib.request.urlopen(request, timeout=GUARD_S) as response:
        return str(response.read().decode())


def tracked(path: str) -> list[str]:
    """The files of git in a folder."""
    command = ["git", "ls-files", path]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()


def expect_equal(names: set[str], wanted: set[str], what: str) -> None:
    if names != wanted:
        fail(f"{what} lacks {sorted(wanted - names)} and has besides {sorted(names - wanted)}")


def run(*command: str) -> None:
    say(" ".join(command))
    subprocess.run(command, cwd=ROOT, check=True)


def say(text: str) -> None:
    print(text, flush=True)


def fail(text: str) -> None:
    sys.exit(f"release-check: {text}")


if __name__ == "__main__":
    main()
