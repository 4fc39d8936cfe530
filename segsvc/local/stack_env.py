"""``stack.env``: all settings of a running local stack, as the file that every process of it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dotenv import dotenv_values

from segsvc.config import Settings


def write_env(path: Path, settings: Settings) -> None:
    """Write all settings as ``SEGSVC_NAME='value'`` for its owner's eyes only, whole or not at all."""
    unfinished = path.with_suffix(".new")
    unfinished.unlink(missing_ok=True)
    unfinished.touch(mode=0o600)
    lines = []
    for name, value in settings.model_dump(mode="json").items():
        if value is not None:
            text = " ".join(value) if isinstance(value, list) else str(value)
            quoted = text.replace("\\", "\\\\").replace("'", "\\'")
            lines.append(f"SEGSVC_{name.upper()}='{quoted}'\n")
    unfinished.write_text("".join(lines))
    unfinished.replace(path)


def read_env(path: Path) -> dict[str, Any]:
    """What ``write_env`` wrote, by field name: the environment does not come into it."""
    return {
        name.removeprefix("SEGSVC_").lower(): value
        for name, value in dotenv_values(path, interpolate=False).items()
        if value is not None
    }
