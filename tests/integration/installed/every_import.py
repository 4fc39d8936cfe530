"""Imports all our modules; test_installed.py runs it in an environment without pytest.

It leaves out the modules of the local stack and the scripts of the migrations. It prints nothing if all succeed.
"""

from __future__ import annotations

import importlib
import pkgutil

_ROOTS = ("segsvc", "tasks", "grpc_api")
_LEFT_OUT = (
    # They need the extra `local`.
    *("segsvc.local", "segsvc.demo.run"),
    # It runs the command line.
    "segsvc.__main__",
)


def main() -> None:
    for root in _ROOTS:
        package = importlib.import_module(root)
        for module in pkgutil.walk_packages(package.__path__, f"{root}.", onerror=_raise):
            if not module.name.startswith(_LEFT_OUT) and "generated" not in module.name:
                importlib.import_module(module.name)


def _raise(name: str) -> None:
    raise ImportError(name)


if __name__ == "__main__":
    main()
