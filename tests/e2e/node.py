"""Runs the Node programs in `tests/clients`, which use the official clients.

A program prints one JSON object per line and reads messages from its standard input, so a test reads as a conversation.
Tests never sleep: a line that does not arrive within `GUARD_S` fails the test and shows the output so far.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from tests.e2e.site import GUARD_S, ROOT, SECRET, Line, Site
from tests.requirements import node_binary, npm_packages

CLIENTS = Path(os.environ.get("CLIENTS", ROOT / "tests" / "clients")).absolute()
"""The folder of the programs and their packages. Another folder tests other versions of the packages."""

FRONTENDS = ROOT / "tests" / "frontends"
"""The folder of the programs that use the packages of chat frontends."""

OF_A_WORKER = {"pipe", "write", "receive", "metadata"}
"""Programs that replace global managers of the official package, as its worker does, so each needs its own process."""


class Process:
    """A Node process. Passes each line of its output to `on_line`, and None at its end."""

    def __init__(self, on_line: Callable[[str | None], None], *arguments: str, folder: Path = CLIENTS) -> None:
        self._on_line = on_line
        self._process = subprocess.Popen(
            [node_binary(), "run.mjs", *arguments],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            bufsize=1,
        )
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._on_line(line)
        self._on_line(None)

    def write(self, line: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()

    def exit_code(self) -> int:
        return self._process.wait(GUARD_S)

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._thread.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


class Program(ABC):
    """A running program."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._seen: list[str] = []
        self._lines: queue.Queue[Line | None] = queue.Queue()
        self._over = False

    def add_line(self, line: Line | None) -> None:
        """Add a line of its output, or None at its end."""
        self._seen.append(f"{json.dumps(line)}\n")
        self._lines.put(line)

    def add_text(self, text: str) -> None:
        """Add other output, such as a warning of Node, to what a failure shows."""
        self._seen.append(text)

    @abstractmethod
    def send(self, what: Any) -> None:
        """Send it a message."""

    @abstractmethod
    def kill(self) -> None:
        """End it immediately."""

    def line(self) -> Line:
        """The next line of output."""
        line = self._next()
        assert line is not None, self._failure("ended without another line")
        return line

    def next(self, kind: str) -> Any:
        """The next line of output, which must be of this kind."""
        line = self.line()
        assert list(line)[0] == kind, self._failure(f"printed {line} instead of {kind}")
        return line[kind]

    def until(self, kind: str, condition: Callable[[Any], object] = lambda _: True) -> Any:
        """Skip output until a line of this kind meets the condition."""
        while True:
            line = self.line()
            if kind in line and condition(line[kind]):
                return line[kind]

    def rest(self) -> list[Line]:
        """All further output until the program ends."""
        lines = []
        while (line := self._next()) is not None:
            lines.append(line)
        return lines

    def _next(self) -> Line | None:
        if self._over:
            return None
        try:
            line = self._lines.get(timeout=GUARD_S)
        except queue.Empty:
            raise AssertionError(self._failure(f"printed nothing for {GUARD_S:g} s")) from None
        self._over = line is None
        return line

    def _failure(self, what: str) -> str:
        return f"{self._name}.mjs {what}; its output so far:\n{''.join(self._seen)}"


class Separate(Program):
    """A program that has a process to itself."""

    def __init__(self, name: str, given: Line, folder: Path = CLIENTS) -> None:
        super().__init__(name)
        self._process = Process(self._on_line, name, json.dumps(given), folder=folder)

    def _on_line(self, text: str | None) -> None:
        if text is None or text.startswith("{"):
            self.add_line(None if text is None else json.loads(text))
        else:
            self.add_text(text)

    def send(self, what: Any) -> None:
        self._process.write(what)

    def rest(self) -> list[Line]:
        lines = super().rest()
        code = self._process.exit_code()
        assert code == 0, self._failure(f"ended with {code}")
        return lines

    def kill(self) -> None:
        self._process.kill()


class Shared(Program):
    """A program that shares a process with others, so it does not load the packages again."""

    def __init__(self, name: str, given: Line, process: SharedProcess) -> None:
        super().__init__(name)
        self._shared = process
        self._number = process.start(self, name, given)

    def send(self, what: Any) -> None:
        self._shared.write([self._number, "send", what])

    def kill(self) -> None:
        self._shared.leave(self._number)


class SharedProcess:
    """Runs any number of programs. Starts with the first; killing a program that has not ended kills the process."""

    def __init__(self) -> None:
        self._numbers = count()
        self._programs: dict[int, Program] = {}
        self._left: set[int] = set()
        self._process: Process | None = None

    def start(self, program: Program, name: str, given: Line) -> int:
        if self._process is None or not self._process.runs:
            self.end()
            self._process = Process(self._on_line)
        number = next(self._numbers)
        self._programs[number] = program
        self.write([number, "start", name, given])
        return number

    def write(self, line: Any) -> None:
        assert self._process is not None
        self._process.write(line)

    def leave(self, number: int) -> None:
        """A test no longer needs a program. If it is still running, the process ends once no program is needed."""
        self._left.add(number)
        running = set(self._programs)  # the reader thread changes it
        if running and running <= self._left:
            self.end()

    def end(self) -> None:
        self._programs.clear()
        if self._process is not None:
            self._process.kill()
            self._process = None

    def _on_line(self, text: str | None) -> None:
        if text is not None and text.startswith("["):
            number, line = json.loads(text)
            program = self._programs.get(number) if line else self._programs.pop(number, None)
            if program is not None:
                program.add_line(line)
            return
        for program in list(self._programs.values()):
            if text is None:
                program.add_text("the process ended\n")
                program.add_line(None)
            else:
                program.add_text(text)


shared = SharedProcess()


@contextmanager
def running(program: str, site: Site, *, alone: bool = False, **given: Any) -> Iterator[Program]:
    """A program that talks to a server. Without `token` it uses the secret key."""
    given.setdefault("baseURL", site.base_url)
    if "token" not in given:
        given.setdefault("secretKey", SECRET)
    started = Separate(program, given) if alone or program in OF_A_WORKER else Shared(program, given, shared)
    try:
        yield started
        if given.get("breakAfter"):
            started.rest()  # cheaper than killing the process and starting another
    finally:
        started.kill()


@contextmanager
def frontend(program: str, **given: Any) -> Iterator[Program]:
    """A program in `tests/frontends`."""
    started = Separate(program, given, npm_packages(FRONTENDS))
    try:
        yield started
    finally:
        started.kill()
