"""Two advisory locks with one key would be one lock: a session would wait for work that does not concern it."""

from __future__ import annotations

import re
from pathlib import Path

from segsvc.postgres import locks

PACKAGE = Path(locks.__file__).parent


def keys() -> dict[str, int]:
    return {name: value for name, value in vars(locks).items() if name.endswith("_LOCK")}


def test_each_key_is_its_own() -> None:
    assert keys()
    assert len(set(keys().values())) == len(keys())


def test_every_advisory_lock_has_a_key_of_the_list() -> None:
    used = {
        argument
        for path in PACKAGE.rglob("*.py")
        for argument in re.findall(r"pg_(?:try_)?advisory_\w+\(([^()]*)\)", path.read_text(encoding="utf-8"))
    }
    assert used == set(keys()), "a number of its own, or a key that nobody uses"
