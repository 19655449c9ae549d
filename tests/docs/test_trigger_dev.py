"""The claims of docs/trigger-dev.md about hooks."""

from __future__ import annotations

import json
import re
import subprocess

import pytest

from tests.docs.blocks import ROOT
from tests.requirements import node_binary, npm_packages

DOCUMENT = ROOT / "docs/trigger-dev.md"
REACT_APP = ROOT / "examples/react_app"

pytestmark = [pytest.mark.slow, pytest.mark.server]


def test_every_hook_is_documented() -> None:
    program = "import('@trigger.dev/react-hooks').then((all) => console.log(JSON.stringify(Object.keys(all))))"
    command = [node_binary(), "--eval", program]
    done = subprocess.run(command, cwd=npm_packages(REACT_APP), capture_output=True, text=True, check=True)
    hooks = {name for name in json.loads(done.stdout) if name.startswith("use")}
    table = DOCUMENT.read_text("utf-8").partition("### Hooks")[2].partition("###")[0]
    assert set(re.findall(r"`(use\w+)`", table)) == hooks
