"""The result of one check of `doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Mark(Enum):
    """How bad a finding is, with its sign and its color on a terminal (SGR code)."""

    GOOD = ("✓", "32")
    NOTE = ("!", "33")
    BAD = ("✗", "31")


@dataclass(frozen=True)
class Finding:
    """One line of the report, and how to fix what it reports."""

    mark: Mark
    text: str
    cure: str = ""
