"""Makes the links and images of the README absolute in the package: an index shows it outside of the repository.

The address is `Repository` in `[project.urls]` of pyproject.toml. Without one, the README is unchanged.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"(!?)(\[[^\]]*\])\((?!https?:|#)([^)\s]+)\)")


class ReadmeHook(MetadataHookInterface):
    def update(self, metadata: dict[str, Any]) -> None:
        text = Path(self.root, "README.md").read_text("utf-8")
        repository = metadata.get("urls", {}).get("Repository")
        if repository:
            text = _LINK.sub(lambda m: f"{m[1]}{m[2]}({repository}/{'raw' if m[1] else 'blob'}/HEAD/{m[3]})", text)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
