"""Ids of new runs and batches. Random, so no id is ever used twice."""

from __future__ import annotations

import secrets


def new_run_id() -> str:
    return f"run_{secrets.token_hex(13)}"


def new_batch_id() -> str:
    return f"batch_{secrets.token_hex(13)}"
