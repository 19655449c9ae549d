"""What the examples do around the chat: ports, and where the model comes from."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from examples import local_model
from examples.local_model import ModelMissing, find_model, model_endpoint
from examples.server import free_socket


def test_a_busy_port_takes_the_next() -> None:
    with free_socket(20_000) as first:
        port = first.getsockname()[1]
        with free_socket(port) as second:
            assert second.getsockname()[1] > port


def test_the_model_is_found_without_importing_its_package(model_path: Path) -> None:
    assert model_path.suffix == ".gguf"
    assert model_path.stat().st_size > 90_000_000


def test_a_missing_model_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def distribution(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(local_model, "distribution", distribution)
    with pytest.raises(ModelMissing, match="xllamacpp is not installed; `make model` installs it"):
        find_model()


def test_an_endpoint_of_the_users_own_needs_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_model, "find_model", None)
    monkeypatch.setenv("OPENAI_API_KEY", "")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with model_endpoint():
        assert os.environ["OPENAI_BASE_URL"] == "http://127.0.0.1:9/v1"
        assert os.environ["OPENAI_API_KEY"]
