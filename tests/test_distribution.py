"""What the wheel and the sdist contain."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "asgi_realtime"
STRAY = (".env", ".env.local", "id_rsa", "key.pem", "secrets.json", "notes.txt", "redis/.env")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the distributions of a checkout that has stray files in its package folder."""
    pytest.importorskip("hatchling")
    checkout = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "SECURITY.md"):
        shutil.copy(ROOT / name, checkout)
    shutil.copytree(PACKAGE, checkout / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in STRAY:
        for folder in (checkout / PACKAGE.name, checkout / PACKAGE.name / "brokers", checkout / "docs"):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("SECRET_KEY=stray")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", "dist"], cwd=checkout, check=True, timeout=60)
    return checkout / "dist"


@pytest.mark.slow
def test_the_wheel_has_the_files_of_the_package_and_no_stray_file(built: Path) -> None:
    """A `.env` in the package folder was published with the wheel."""
    (wheel,) = built.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = [path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".lua") or path.name == "py.typed"]
    assert names == {str(path.relative_to(ROOT)) for path in wanted}


@pytest.mark.slow
def test_the_sdist_has_no_hidden_file(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    names = {name.partition("/")[2] for name in tarfile.open(sdist).getnames()}
    assert {"SECURITY.md", "asgi_realtime/py.typed", "asgi_realtime/brokers/redis/lua/append.lua"} <= names
    assert [name for name in names if Path(name).name.startswith(".") and name != ".gitignore"] == []
    assert [name for name in names if name.startswith("asgi_realtime/") and Path(name).name in STRAY] == []


def test_every_kind_of_file_in_the_package_is_listed() -> None:
    """Also without a build: a new kind of file must be added to pyproject.toml, or it is missing in the wheel."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert build["exclude"] == [".*"]
    patterns = build["targets"]["wheel"]["include"]
    tracked = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {path.suffix for path in tracked} == {".py", ".lua", ".typed"}
    assert set(patterns) == {"/asgi_realtime/**/*.py", "/asgi_realtime/**/*.lua", "/asgi_realtime/py.typed"}
