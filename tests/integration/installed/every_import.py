"""Run by test_installed.py in an environment without pytest: imports every module of ours, those of the local stack and
of the migrations' scripts apart. Says nothing if all goes well."""

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
