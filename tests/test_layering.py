"""Imports of the package go downward only, and each foreign package is imported where it is needed and nowhere else.

The source is parsed, so an import inside a function counts. Blocks under `if TYPE_CHECKING:` do not: they are for
readers and for mypy, and bind nothing at run time.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import asgi_realtime

ROOT = Path(asgi_realtime.__file__).parent
PACKAGE = "asgi_realtime"

IN_PROCESS = "the in-process API"
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "config"}),
    frozenset({"core"}),
    frozenset({"tokens", "waiting", "livelog", "brokers"}),
    frozenset({IN_PROCESS}),
    frozenset({"asgi"}),
    frozenset({"client", "testing"}),
    frozenset({"cli", "__main__"}),
)
"""From the bottom upward. A module may import its own layer and those before it. The two last stand on top: only the
command line uses what is in the one before it, and nobody uses the command line.

Whatever is not named is of the in-process API: `pipe`, `handles`, `realtime`, `tasks` and what they are made of.
"""

UPWARD = {("realtime", "asgi")}
"""`Realtime` is itself the ASGI app, so it makes the app of the layer above when first called: in a function only."""

NOT_IN_CORE = frozenset(
    "asyncio concurrent contextvars http logging multiprocessing os random secrets selectors signal socket ssl "
    "subprocess threading time urllib".split()
)
"""Core has no loop, no thread, no clock, no dice and no I/O: what depends on them is an argument."""

EVERYWHERE = frozenset({""})
FOREIGN: dict[str, frozenset[str]] = {
    "msgspec": EVERYWHERE,
    "anyio": EVERYWHERE,
    "starlette": frozenset({"asgi"}),
    "jwt": frozenset({"tokens", "cli"}),
    "trio": frozenset({"waiting", "supervisor"}),
    "redis": frozenset({"brokers.redis"}),
    "hiredis": frozenset({"brokers.redis"}),
    "taskiq": frozenset({"tasks.taskiq"}),
    "pydantic": frozenset({"tasks"}),
    "httpx": frozenset({"client", "cli"}),
    "pytest": frozenset({"testing"}),
    "hypothesis": frozenset({"testing"}),
}
"""Which modules (with what is in them) may import a package that is not ours and not Python's."""

NOT_IN_CORE |= FOREIGN.keys() - {"msgspec"}


class Import(NamedTuple):
    module: str
    """Who imports, without the package's name; empty for the package's own face."""
    target: str
    line: int
    in_function: bool

    def __str__(self) -> str:
        return f"{self.module or '__init__'}:{self.line} imports {self.target}"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def walk(node: ast.AST, in_function: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import statement that can run, and whether it stands in a function."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node, in_function
    if is_type_checking(node):
        assert isinstance(node, ast.If)
        for statement in node.orelse:
            yield from walk(statement, in_function)
        return
    inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        yield from walk(child, inside)


def targets(node: ast.Import | ast.ImportFrom, module: str, is_package: bool) -> Iterator[str]:
    """The absolute names of the imported modules; `from a import b` names `a.b` where that is a module."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    base = node.module or ""
    if node.level:
        here = [PACKAGE, *filter(None, module.split("."))]
        parents = here[: len(here) + is_package - node.level]
        base = ".".join([*parents, *filter(None, [base])])
    for alias in node.names:
        inner = f"{base}.{alias.name}"
        yield inner if inner.removeprefix(f"{PACKAGE}.") in SOURCES else base


def read_imports(module: str, source: str, *, is_package: bool) -> list[Import]:
    return [
        Import(module, target, node.lineno, in_function)
        for node, in_function in walk(ast.parse(source))
        for target in targets(node, module, is_package)
    ]


def all_imports() -> list[Import]:
    return [
        found
        for module, path in SOURCES.items()
        for found in read_imports(module, path.read_text(), is_package=path.name == "__init__.py")
    ]


def own_target(found: Import) -> str | None:
    """The imported module of ours without the package's name, or None if it is foreign."""
    package, _, rest = found.target.partition(".")
    return rest if package == PACKAGE else None


def layer_of(module: str) -> int:
    top = module.partition(".")[0]
    named = [height for height, names in enumerate(LAYERS) if top in names]
    return named[0] if named else next(height for height, names in enumerate(LAYERS) if IN_PROCESS in names)


def is_upward(found: Import) -> bool:
    target = own_target(found)
    if not target or not found.module:  # `__version__` and the like; the face re-exports from all layers but the last
        return False
    source_top, target_top = found.module.partition(".")[0], target.partition(".")[0]
    if (source_top, target_top) in UPWARD:
        return not found.in_function
    return layer_of(target) > layer_of(found.module)


def is_impure(found: Import) -> bool:
    return found.module.partition(".")[0] == "core" and found.target.partition(".")[0] in NOT_IN_CORE


def is_misplaced(found: Import) -> bool:
    package = found.target.partition(".")[0]
    if package in sys.stdlib_module_names or own_target(found) is not None:
        return False
    places = FOREIGN.get(package, frozenset())
    return not any(place in ("", found.module) or found.module.startswith(f"{place}.") for place in places)


def test_imports_go_downward_only() -> None:
    assert [str(found) for found in all_imports() if is_upward(found)] == []


def test_nobody_imports_what_stands_on_top() -> None:
    *_, on_top, command_line = LAYERS
    intruders = []
    for found in all_imports():
        source, target = found.module.partition(".")[0], (own_target(found) or "").partition(".")[0]
        allowed = {source} | (command_line | {"client"} if source in command_line else set())
        if target in on_top | command_line and target not in allowed:
            intruders.append(str(found))
    assert intruders == []


def test_core_is_pure() -> None:
    assert [str(found) for found in all_imports() if is_impure(found)] == []


def test_foreign_packages_are_imported_only_where_they_are_needed() -> None:
    assert [str(found) for found in all_imports() if is_misplaced(found)] == []


def test_importing_the_package_loads_no_extra() -> None:
    extras = set("redis hiredis taskiq celery trio pydantic httpx pytest hypothesis openai anthropic".split())
    extras |= {"fastapi", "litestar", "quart", "django", "hypercorn"}
    script = f"import sys, {PACKAGE}; print(sorted({extras} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("core.log", "from asgi_realtime.core.errors import StreamClosed", False),
        ("core.log", "from asgi_realtime.brokers.live_log import LiveLog", True),
        ("core.log", "from ..livelog import LiveLog", True),
        ("core.log", "from .. import livelog", True),
        ("core.log", "from .sse import frame", False),
        ("core.log", "def f():\n    import asgi_realtime.streams.pipe", True),
        ("core.log", "if TYPE_CHECKING:\n    from asgi_realtime.streams.pipe import Pipe", False),
        ("core.log", "if TYPE_CHECKING:\n    pass\nelse:\n    import asgi_realtime.streams.pipe", True),
        ("realtime", "from asgi_realtime.asgi.app import App", True),
        ("realtime", "def f():\n    from asgi_realtime.asgi.app import App", False),
        ("tasks.decorator", "def f():\n    from asgi_realtime.asgi.app import App", True),
    ],
)
def test_the_check_itself_finds_upward_imports(module: str, source: str, wrong: bool) -> None:
    found = read_imports(module, source, is_package=False)
    assert any(is_upward(one) for one in found) is wrong


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("brokers.redis", "import redis.asyncio", False),
        ("brokers.redis.link", "import hiredis", False),
        ("brokers.memory", "import redis.asyncio", True),
        ("tasks.taskiq", "import taskiq", False),
        ("tasks.executor", "import taskiq", True),
        ("core.log", "import msgspec", False),
        ("core.log", "import numpy", True),
        ("pipe", "import starlette", True),
        ("pipe", "import json", False),
    ],
)
def test_the_check_itself_finds_misplaced_packages(module: str, source: str, wrong: bool) -> None:
    assert any(is_misplaced(one) for one in read_imports(module, source, is_package=False)) is wrong


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("core.log", "import anyio", True),
        ("core.log", "def f():\n    from time import monotonic", True),
        ("core.log", "import msgspec", False),
        ("core.log", "from datetime import datetime", False),
        ("livelog", "import time", False),
    ],
)
def test_the_check_itself_finds_what_core_may_not_import(module: str, source: str, wrong: bool) -> None:
    assert any(is_impure(one) for one in read_imports(module, source, is_package=False)) is wrong
