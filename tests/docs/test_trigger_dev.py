"""The claims of docs/trigger-dev.md about frontend code and hooks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.docs.blocks import BLOCKS, ROOT, Block
from tests.requirements import node_binary, npm_packages

DOCUMENT = ROOT / "docs/trigger-dev.md"
REACT_APP = ROOT / "examples/react_app"

pytestmark = [pytest.mark.slow, pytest.mark.server]


@pytest.mark.parametrize("block", [one for one in BLOCKS if (one.document, one.language) == (DOCUMENT, "tsx")], ids=str)
def test_frontend_code_type_checks(block: Block, tmp_path: Path) -> None:
    node_binary()
    (tmp_path / "node_modules").symlink_to(npm_packages(REACT_APP) / "node_modules")
    shutil.copy(REACT_APP / "tsconfig.json", tmp_path)
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "block.tsx").write_text(block.text, "utf-8")
    done = subprocess.run(["node_modules/.bin/tsc"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_hook_is_documented() -> None:
    program = "import('@trigger.dev/react-hooks').then((all) => console.log(JSON.stringify(Object.keys(all))))"
    command = [node_binary(), "--eval", program]
    done = subprocess.run(command, cwd=npm_packages(REACT_APP), capture_output=True, text=True, check=True)
    hooks = {name for name in json.loads(done.stdout) if name.startswith("use")}
    table = DOCUMENT.read_text("utf-8").partition("### Hooks")[2].partition("###")[0]
    assert set(re.findall(r"`(use\w+)`", table)) == hooks
