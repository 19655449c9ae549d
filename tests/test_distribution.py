"""What the wheel and the sdist contain."""

from __future__ import annotations

import os
import re
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
PLUGIN = "asgi_realtime_pytest.py"
REPOSITORY = "https://code.example/asgi_realtime"
STRAY = (".env", ".env.local", "id_rsa", "key.pem", "secrets.json", "notes.txt", "redis/.env")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the distributions of a checkout that has stray files in its package folder."""
    pytest.importorskip("hatchling")
    checkout = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "SECURITY.md", "hatch_build.py", PLUGIN):
        shutil.copy(ROOT / name, checkout)
    with (checkout / "pyproject.toml").open("a") as project:
        project.write(f'\n[project.urls]\nRepository = "{REPOSITORY}"\n')
    shutil.copytree(PACKAGE, checkout / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in STRAY:
        for folder in (checkout / PACKAGE.name, checkout / PACKAGE.name / "brokers", checkout / "docs"):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("SECRET_KEY=stray")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", "dist"], cwd=checkout, check=True)
    return checkout / "dist"


@pytest.mark.slow
def test_the_wheel_has_the_files_of_the_package_and_no_stray_file(built: Path) -> None:
    """A `.env` in the package folder was published with the wheel."""
    (wheel,) = built.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    kinds = (".py", ".js", ".css", ".html", ".lua")
    wanted = [path for path in PACKAGE.rglob("*") if path.suffix in kinds or path.name == "py.typed"]
    assert names == {PLUGIN, *(str(path.relative_to(ROOT)) for path in wanted)}


@pytest.mark.slow
def test_the_wheel_installs_the_command(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(tmp_path)]
    subprocess.run([*pip, str(wheel)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    script = shutil.which("asgi-realtime", path=tmp_path / "bin")
    assert script is not None
    for command, name in (([script], "asgi-realtime"), ([sys.executable, "-m", "asgi_realtime"], None)):
        command.append("token")
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith(f"{name or 'python -m asgi_realtime'}: "), done.stderr


@pytest.mark.slow
def test_links_of_the_readme_work_on_a_package_index(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = archive.read(name).decode()
    assert "\nDescription-Content-Type: text/markdown\n" in metadata
    assert f"({REPOSITORY}/raw/HEAD/docs/restart.gif)" in metadata
    assert f"[thread]({REPOSITORY}/blob/HEAD/docs/stop.md#threads)" in metadata
    assert re.findall(r"\]\((?!https?://)[^)]*\)", metadata) == []


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
    assert {path.suffix for path in tracked} == {".py", ".js", ".css", ".html", ".lua", ".typed"}
    assert set(patterns) == {
        "/asgi_realtime/**/*.py",
        "/asgi_realtime/**/*.js",
        "/asgi_realtime/**/*.css",
        "/asgi_realtime/**/*.html",
        "/asgi_realtime/**/*.lua",
        "/asgi_realtime/py.typed",
        f"/{PLUGIN}",
    }
