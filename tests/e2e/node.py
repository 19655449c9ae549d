"""Programs in Node that use the official clients: those in `tests/clients`.

A program prints one JSON object a line and is told things by lines on its standard input, so a test reads as a
conversation. Nothing waits for a time: what does not come within the guard fails with all that was printed.
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
from tests.requirements import node_binary

CLIENTS = Path(os.environ.get("CLIENTS", ROOT / "tests" / "clients")).absolute()
"""Where the programs are, with the packages that they use: another folder for other versions of those."""

OF_A_WORKER = {"pipe", "write", "receive", "metadata"}
"""Programs that register for their whole process what the worker of the official package does."""


class Process:
    """A process of Node. Every line that it prints goes to `heard`, and None when it has ended."""

    def __init__(self, heard: Callable[[str | None], None], *arguments: str) -> None:
        self._heard = heard
        self._process = subprocess.Popen(
            [node_binary(), "run.mjs", *arguments],
            cwd=CLIENTS,
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
            self._heard(line)
        self._heard(None)

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
    """A program that runs."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._seen: list[str] = []
        self._lines: queue.Queue[Line | None] = queue.Queue()
        self._over = False

    def hear(self, line: Line | None) -> None:
        """It said this; None: it has ended."""
        self._seen.append(f"{json.dumps(line)}\n")
        self._lines.put(line)

    def hear_text(self, text: str) -> None:
        """Something else was printed, such as a warning of Node, for whoever reads of a failure."""
        self._seen.append(text)

    @abstractmethod
    def tell(self, what: Any) -> None:
        """Say something to it."""

    @abstractmethod
    def kill(self) -> None:
        """End it at once."""

    def line(self) -> Line:
        """The next thing that it says."""
        line = self._next()
        assert line is not None, self._told("ended without another line")
        return line

    def next(self, kind: str) -> Any:
        """The next thing that it says, which is of this kind."""
        line = self.line()
        assert list(line)[0] == kind, self._told(f"said {line} and no {kind}")
        return line[kind]

    def until(self, kind: str, condition: Callable[[Any], object] = lambda _: True) -> Any:
        """Pass over what it says until it says this."""
        while True:
            line = self.line()
            if kind in line and condition(line[kind]):
                return line[kind]

    def rest(self) -> list[Line]:
        """All that it still says, until it ends by itself."""
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
            raise AssertionError(self._told(f"says nothing for {GUARD_S:g} s")) from None
        self._over = line is None
        return line

    def _told(self, what: str) -> str:
        return f"{self._name}.mjs {what}; its output so far:\n{''.join(self._seen)}"


class Alone(Program):
    """A program in a process of its own."""

    def __init__(self, name: str, given: Line) -> None:
        super().__init__(name)
        self._process = Process(self._heard, name, json.dumps(given))

    def _heard(self, text: str | None) -> None:
        if text is None or text.startswith("{"):
            self.hear(None if text is None else json.loads(text))
        else:
            self.hear_text(text)

    def tell(self, what: Any) -> None:
        self._process.write(what)

    def rest(self) -> list[Line]:
        lines = super().rest()
        code = self._process.exit_code()
        assert code == 0, self._told(f"ended with {code}")
        return lines

    def kill(self) -> None:
        self._process.kill()


class Shared(Program):
    """A program beside others in one process, whose packages are loaded already."""

    def __init__(self, name: str, given: Line, process: SharedProcess) -> None:
        super().__init__(name)
        self._shared = process
        self._number = process.start(self, name, given)

    def tell(self, what: Any) -> None:
        self._shared.write([self._number, "tell", what])

    def kill(self) -> None:
        self._shared.leave(self._number)


class SharedProcess:
    """Runs programs at once. It is there until one is to be killed."""

    def __init__(self) -> None:
        self._numbers = count()
        self._programs: dict[int, Program] = {}
        self._left: set[int] = set()
        self._process: Process | None = None

    def start(self, program: Program, name: str, given: Line) -> int:
        if self._process is None or not self._process.runs:
            self.end()
            self._process = Process(self._heard)
        number = next(self._numbers)
        self._programs[number] = program
        self.write([number, "start", name, given])
        return number

    def write(self, line: Any) -> None:
        assert self._process is not None
        self._process.write(line)

    def leave(self, number: int) -> None:
        """A test has done with a program. One that has not ended by itself ends with the process, once all are left."""
        self._left.add(number)
        running = set(self._programs)  # which the other thread changes
        if running and running <= self._left:
            self.end()

    def end(self) -> None:
        self._programs.clear()
        if self._process is not None:
            self._process.kill()
            self._process = None

    def _heard(self, text: str | None) -> None:
        if text is not None and text.startswith("["):
            number, line = json.loads(text)
            program = self._programs.get(number) if line else self._programs.pop(number, None)
            if program is not None:
                program.hear(line)
            return
        for program in list(self._programs.values()):
            if text is None:
                program.hear_text("the process has ended\n")
                program.hear(None)
            else:
                program.hear_text(text)


shared = SharedProcess()


@contextmanager
def running(program: str, site: Site, *, alone: bool = False, **given: Any) -> Iterator[Program]:
    """A program, against a server. Without `token` it has the secret key."""
    given.setdefault("baseURL", site.base_url)
    if "token" not in given:
        given.setdefault("secretKey", SECRET)
    started = Alone(program, given) if alone or program in OF_A_WORKER else Shared(program, given, shared)
    try:
        yield started
        if given.get("breakAfter"):
            started.rest()  # which is soon, and sooner than another process is there
    finally:
        started.kill()
