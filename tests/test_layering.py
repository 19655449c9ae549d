"""Imports of the package point down the list of packages, form no cycle, and load foreign packages only where needed.

The source is parsed, so an import inside a function counts, and so does one under `if TYPE_CHECKING:`. A type that
would need an upward import is a `Protocol` instead.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import asgi_realtime

ROOT = Path(asgi_realtime.__file__).parent
PACKAGE = "asgi_realtime"

TOP = "top level"
DOOR = "asgi (app and routes)"
FACE = "__init__"
LAYERS = (
    "core",
    "loop",
    "brokers",
    "runs",
    "streams",
    "ai",
    "engine",
    "tasks",
    "tokens",
    "calls",
    TOP,
    "asgi",
    "asgi.trigger_dev",
    DOOR,
    "client",
    "testing",
    "cli",
    FACE,
)
"""From the bottom up. A module may import its own layer and the layers before it."""

APPLICATIONS = ("client", "testing", "cli")
"""Built on top of everything else. Only the command line imports one of the others, `client`."""

DOORS = ("asgi", "asgi.app", "asgi.routes")
"""The modules of `asgi` that join the generic endpoints and those of the Trigger.dev dialect into one app."""

UPWARD = {("realtime", "asgi.app"), ("realtime", "asgi.host_response")}
"""`Realtime` is itself the ASGI app, so it imports that app when first called: inside a function, or for its types."""

NOT_IN_CORE = frozenset(
    "asyncio concurrent contextvars http logging multiprocessing os random secrets selectors signal socket ssl "
    "subprocess threading time urllib".split()
)
"""Core has no event loop, thread, clock, randomness or I/O: it takes what depends on them as arguments."""

EVERYWHERE = frozenset({""})
FOREIGN: dict[str, frozenset[str]] = {
    "msgspec": EVERYWHERE,
    "anyio": EVERYWHERE,
    "starlette": frozenset({"asgi"}),
    "jwt": frozenset({"tokens", "cli"}),
    "trio": frozenset({"loop"}),
    "typing_extensions": frozenset({"engine.run"}),  # for type checkers only
    "redis": frozenset({"brokers.redis"}),
    "hiredis": frozenset({"brokers.redis"}),
    "taskiq": frozenset({"tasks.taskiq"}),
    "pydantic": frozenset({"tasks"}),
    "httpx": frozenset({"client", "cli"}),
    "opentelemetry": frozenset({"runs.tracing"}),
    "prometheus_client": frozenset({"metrics"}),
    "pytest": frozenset({"testing"}),
    "hypothesis": frozenset({"testing"}),
}
"""The modules, including their submodules, that may import a package from outside the standard library."""

NOT_IN_CORE |= FOREIGN.keys() - {"msgspec"}


class Import(NamedTuple):
    module: str
    """The importing module without the package's name; empty for the package itself."""
    target: str
    line: int
    in_function: bool

    def __str__(self) -> str:
        return f"{self.module or '__init__'}:{self.line} imports {self.target}"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}
PACKAGES = {module for module, path in SOURCES.items() if module and path.name == "__init__.py"}


def walk(node: ast.AST, in_function: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Yield every import statement, and whether it is inside a function or only for types."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node, in_function
    inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    inside |= isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    for child in ast.iter_child_nodes(node):
        yield from walk(child, inside)


def targets(node: ast.Import | ast.ImportFrom, module: str, is_package: bool) -> Iterator[str]:
    """Yield the absolute names of the imported modules; `from a import b` yields `a.b` if that is a module."""
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
    """The imported module of this package without the package's name, or None if it is foreign."""
    package, _, rest = found.target.partition(".")
    return rest if package == PACKAGE else None


def layer_of(module: str) -> str:
    if not module:
        return FACE
    if module in DOORS:
        return DOOR
    if module == "asgi.trigger_dev" or module.startswith("asgi.trigger_dev."):
        return "asgi.trigger_dev"
    if module == "__main__":
        return "cli"
    top = module.partition(".")[0]
    return top if top in LAYERS else TOP


def is_upward(found: Import) -> bool:
    target = own_target(found)
    if not target:  # foreign, or `__version__`
        return False
    if (found.module, target) in UPWARD and found.in_function:
        return False
    return LAYERS.index(layer_of(target)) > LAYERS.index(layer_of(found.module))


def find_cycle(imports: list[Import]) -> list[str]:
    """The modules of one import cycle, in order; empty if there is none."""
    graph: dict[str, set[str]] = {}
    for found in imports:
        target = own_target(found)
        # A package's `__init__` runs before any of its modules, so importing from it is the only edge that counts here.
        if target and target != found.module and (found.module, target) not in UPWARD:
            graph.setdefault(found.module, set()).add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as exc:
        return [str(module) for module in exc.args[1]]
    return []


def is_impure(found: Import) -> bool:
    return found.module.partition(".")[0] == "core" and found.target.partition(".")[0] in NOT_IN_CORE


def is_misplaced(found: Import) -> bool:
    package = found.target.partition(".")[0]
    if package in sys.stdlib_module_names or own_target(found) is not None:
        return False
    places = FOREIGN.get(package, frozenset())
    return not any(place in ("", found.module) or found.module.startswith(f"{place}.") for place in places)


def test_every_package_is_a_layer() -> None:
    assert {package for package in PACKAGES if "." not in package} <= set(LAYERS)


def test_imports_point_downward() -> None:
    assert [str(found) for found in all_imports() if is_upward(found)] == []


def test_there_is_no_import_cycle() -> None:
    assert find_cycle(all_imports()) == []


def test_the_only_exceptions_are_imports_that_exist() -> None:
    assert UPWARD <= {(found.module, own_target(found)) for found in all_imports() if found.in_function}


def test_nothing_imports_an_application() -> None:
    intruders = []
    for found in all_imports():
        source, target = layer_of(found.module), layer_of(own_target(found) or "")
        allowed = source == target or (source, target) == ("cli", "client")
        if own_target(found) and target in APPLICATIONS and not allowed:
            intruders.append(str(found))
    assert intruders == []


def test_core_is_pure() -> None:
    assert [str(found) for found in all_imports() if is_impure(found)] == []


def test_foreign_packages_are_imported_only_where_they_are_needed() -> None:
    assert [str(found) for found in all_imports() if is_misplaced(found)] == []


def test_each_docstring_is_the_sentence_of_the_architecture_page() -> None:
    page = (ROOT.parent / "docs" / "architecture.md").read_text()
    sentences = dict(re.findall(r"^\| `([\w/]+)/` \| (.+) \|$", page, flags=re.MULTILINE))
    assert [package.replace("/", ".") for package in sentences] == [layer for layer in LAYERS if layer in PACKAGES]
    for package, sentence in sentences.items():
        docstring = ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text())) or ""
        assert " ".join(docstring.split()) == sentence, package


def test_importing_the_package_loads_no_extra() -> None:
    extras = set("redis hiredis taskiq celery trio pydantic httpx pytest hypothesis openai anthropic".split())
    extras |= {"google", "litellm", "pydantic_ai", "agents", "langchain_core", "langgraph", "ag_ui"}
    extras |= {"fastapi", "litestar", "quart", "django", "hypercorn", "prometheus_client", "opentelemetry"}
    script = f"import sys, {PACKAGE}; print(sorted({extras} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("core.log", "from asgi_realtime.core.errors import StreamClosed", False),
        ("core.log", "from asgi_realtime.brokers.live_log import LiveLog", True),
        ("core.log", "from ..brokers.live_log import LiveLog", True),
        ("core.log", "from ..brokers import live_log", True),
        ("core.log", "from .sse import frame", False),
        ("core.log", "def f():\n    import asgi_realtime.streams.pipe", True),
        ("core.log", "if TYPE_CHECKING:\n    from asgi_realtime.streams.pipe import Pipe", True),
        ("streams.pipe", "from asgi_realtime.runs.handles import RunHandle", False),
        ("runs.handles", "from asgi_realtime.streams.pipe import Pipe", True),
        ("asgi.streams", "from asgi_realtime.asgi.trigger_dev.shapes import schema", True),
        ("asgi.routes", "from asgi_realtime.asgi.trigger_dev.shapes import schema", False),
        ("asgi.streams", "from asgi_realtime.asgi.app import RealtimeApp", True),
        ("realtime", "from asgi_realtime.asgi.app import RealtimeApp", True),
        ("realtime", "def f():\n    from asgi_realtime.asgi.app import RealtimeApp", False),
        ("tasks.registry", "def f():\n    from asgi_realtime.asgi.app import RealtimeApp", True),
        ("calls.streams", "from asgi_realtime.realtime import Realtime", True),
        ("engine.run", "from asgi_realtime.tokens import Claims", True),
    ],
)
def test_the_check_finds_upward_imports(module: str, source: str, wrong: bool) -> None:
    found = read_imports(module, source, is_package=False)
    assert any(is_upward(one) for one in found) is wrong


def test_the_check_finds_cycles() -> None:
    there = read_imports("engine.run", "from asgi_realtime.engine.ticker import Ticker", is_package=False)
    back = read_imports(
        "engine.ticker", "if TYPE_CHECKING:\n    from asgi_realtime.engine.run import Run", is_package=False
    )
    assert find_cycle(there) == []
    assert set(find_cycle(there + back)) == {"engine.run", "engine.ticker"}


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("brokers.redis", "import redis.asyncio", False),
        ("brokers.redis.command_connection", "import hiredis", False),
        ("brokers.memory", "import redis.asyncio", True),
        ("tasks.taskiq", "import taskiq", False),
        ("engine.executor", "import taskiq", True),
        ("core.log", "import msgspec", False),
        ("core.log", "import numpy", True),
        ("streams.pipe", "import starlette", True),
        ("streams.pipe", "import json", False),
    ],
)
def test_the_check_finds_misplaced_packages(module: str, source: str, wrong: bool) -> None:
    assert any(is_misplaced(one) for one in read_imports(module, source, is_package=False)) is wrong


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("core.log", "import anyio", True),
        ("core.log", "def f():\n    from time import monotonic", True),
        ("core.log", "import msgspec", False),
        ("core.log", "from datetime import datetime", False),
        ("brokers.live_log", "import time", False),
    ],
)
def test_the_check_finds_what_core_may_not_import(module: str, source: str, wrong: bool) -> None:
    assert any(is_impure(one) for one in read_imports(module, source, is_package=False)) is wrong
