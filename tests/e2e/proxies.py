"""A real nginx in front of a server of a test."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.e2e.hosts.servers import GUARD_S, free_port
from tests.requirements import missing


def nginx_binary() -> str:
    found = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if found is None:
        missing("nginx is not installed (on Debian: apt-get install nginx-light)")
    return found


@contextmanager
def nginx(folder: Path, server: str, *, listen: str = "") -> Iterator[str]:
    """Run nginx with what stands in its one `server { … }`. Gives its host and port. `listen`: `ssl http2` for TLS."""
    port = free_port()
    folder.mkdir()
    paths = " ".join(f"{name}_temp_path temp;" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    configuration = f"""
        daemon off; pid nginx.pid; error_log stderr; events {{}}
        http {{ access_log off; {paths} server {{ listen 127.0.0.1:{port} {listen}; {server} }} }}
    """
    (folder / "nginx.conf").write_text(configuration)
    command = [nginx_binary(), "-p", str(folder), "-c", "nginx.conf"]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            _until_it_answers(f"{'https' if 'ssl' in listen else 'http'}://127.0.0.1:{port}/", process, folder)
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()


def passing_on_to(url: str, lines: str = "") -> str:
    """All paths go to a server."""
    return f"location / {{ proxy_pass {url}; proxy_http_version 1.1; {lines} }}"


def _until_it_answers(url: str, process: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + GUARD_S
    while True:
        try:
            httpx.get(url, verify=False, timeout=GUARD_S)
            return
        except httpx.TransportError:
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, "nginx does not answer"
