"""What the examples do besides chatting: choose ports and find a model. And the Django example, which has none."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page

from examples import local_model
from examples.local_model import ModelMissing, find_model, model_endpoint
from examples.server import free_socket
from tests.chromium import profile
from tests.e2e.conftest import GUARD_S, ROOT


def test_the_next_port_is_used_if_one_is_busy() -> None:
    with free_socket(20_000) as first:
        port = first.getsockname()[1]
        with free_socket(port) as second:
            assert second.getsockname()[1] > port


def test_the_model_is_found_without_importing_its_package(model_path: Path) -> None:
    assert model_path.suffix == ".gguf"
    assert model_path.stat().st_size > 90_000_000


def test_without_a_model_the_error_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def distribution(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(local_model, "distribution", distribution)
    with pytest.raises(ModelMissing, match="xllamacpp is not installed; `make model` installs it"):
        find_model()


def test_with_a_custom_endpoint_no_model_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_model, "find_model", None)
    monkeypatch.setenv("OPENAI_API_KEY", "")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with model_endpoint():
        assert os.environ["OPENAI_BASE_URL"] == "http://127.0.0.1:9/v1"
        assert os.environ["OPENAI_API_KEY"]


# The example in Django


@contextmanager
def served(*command: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run a uvicorn command, which prints its URL. Kill it unless the test has ended it."""
    with subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, "PORT": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            printed = ""
            while not (found := re.search(r"http://\S+", printed)):
                line = process.stdout.readline()
                assert line, f"it ended: {printed}"
                printed += line
            yield found[0], process
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.chromium
def test_the_page_of_the_django_example(chromium: Browser) -> None:
    with served("uvicorn", "examples.django_asgi:app", "--port", "0") as (url, process):
        with profile(chromium) as context:
            page = context.new_page()
            page.goto(url)
            page.fill("#limit", "30")
            page.keyboard.press("Enter")
            page.wait_for_selector("#status[data-status=COMPLETED]")
            page.wait_for_function("document.querySelector('#numbers').textContent.endsWith('29 ')")
            assert page.text_content("#numbers") == "2 3 5 7 11 13 17 19 23 29 "
            assert page.text_content("#status") == "COMPLETED: 10 primes"
            assert page.evaluate("document.querySelector('#progress').value") == 1
            assert page.is_hidden("#stop")

            page.fill("#limit", "100000")
            page.keyboard.press("Enter")
            page.wait_for_function("document.querySelector('#numbers').textContent.length > 100")
            refuse_a_stranger(chromium, page, url)
            with page.expect_response(re.compile("/stop/")) as stopping:
                page.click("#stop")
            assert stopping.value.status == 204
            page.wait_for_selector("#status[data-status=CANCELED]")
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=GUARD_S)
    assert process.returncode in (0, -signal.SIGINT)
    assert "Traceback" not in printed, printed
    assert "access_token=eyJ" not in printed


def refuse_a_stranger(chromium: Browser, page: Page, url: str) -> None:
    """Another browser, with its own CSRF token, cannot stop the run of this page."""
    requested = page.evaluate("performance.getEntriesByType('resource').map((entry) => entry.name).join()")
    run_id = re.findall(r"/runs/(run_\w+)", requested)[-1]
    stranger = chromium.new_context()
    token = re.search(r'"x-csrftoken": "(\w+)"', stranger.request.get(url).text())
    assert token
    for known in (run_id, "run_that_never_was"):
        response = stranger.request.post(f"{url}/stop/{known}", headers={"x-csrftoken": token[1]})
        assert response.status == 404
    stranger.close()


@pytest.mark.slow
def test_the_django_example_as_a_module() -> None:
    with served("examples.django_asgi") as (url, process):
        assert httpx.get(url, timeout=GUARD_S).status_code == 200
        assert httpx.post(f"{url}/start", timeout=GUARD_S).status_code == 403  # without the CSRF token
        assert httpx.get(f"{url}/realtime/v1/health", timeout=GUARD_S).status_code == 200
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=GUARD_S)
    assert process.returncode in (0, -signal.SIGTERM)
    assert "Traceback" not in printed, printed
