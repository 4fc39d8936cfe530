"""What a local stack has chosen for itself, and ``stack.env`` with all its settings, which its processes read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dotenv import dotenv_values

from segsvc.config import Settings
from segsvc.local.processes import free_ports

# The usual ports; other ports are chosen where these are not free.
_PORTS = {
    "grpc_address": 50051,
    "flower_address": 5555,
    # Each process of the front takes the next port, so the gap to the next address is wide.
    "metrics_address": 9464,
    "operation_worker_metrics_address": 9564,
    "event_worker_metrics_address": 9565,
    "warming_worker_metrics_address": 9566,
    "bridge_metrics_address": 9567,
    "beat_metrics_address": 9568,
}


def choose_ports(reserved: ExitStack, wanted: Mapping[str, int] | None = None) -> dict[str, int]:
    """A port for each name: the wanted port if it is free, otherwise another one.

    Until ``reserved`` is closed, no other stack that starts chooses one of them; by then they are in use.

    Args:
        wanted: name → port, 0: any. By default, the settings with addresses and their usual ports.
    """
    wanted = _PORTS if wanted is None else wanted
    preferred = [port for port in wanted.values() if port]
    free = free_ports(2 * len(wanted), preferred=preferred, reserved=reserved)
    others = [port for port in free if port not in preferred]
    return {name: port if port in free else others.pop() for name, port in wanted.items()}


def preferred_ports(choices: StackChoices) -> dict[str, int]:
    """Setting with an address → the port that it had before, or else the usual one."""
    return {name: choices.ports.get(name, port) for name, port in _PORTS.items()}


class StackChoices:
    """What a stack chooses once and keeps: ports and passwords. In a file that only its owner can read.

    Args:
        path: the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        found = json.loads(path.read_text()) if path.exists() else {}
        self.ports: dict[str, int] = found.get("ports", {})
        self._secrets: dict[str, str] = found.get("secrets", {})

    def secret(self, name: str, draw: Callable[[], str]) -> str:
        """The password of this name; drawn and written to the file if there is none yet."""
        if name not in self._secrets:
            self._secrets[name] = draw()
            self.write()
        return self._secrets[name]

    def write(self) -> None:
        """Write the file, completely or not at all."""
        write_private(self._path, json.dumps({"ports": self.ports, "secrets": self._secrets}, indent=2) + "\n")


def metrics_addresses(settings: Settings) -> dict[str, str]:
    """Name of a process for people → host:port of its metrics; without the processes that serve none."""
    addresses = {
        "front": settings.metrics_address,
        "operations worker": settings.operation_worker_metrics_address,
        "events worker": settings.event_worker_metrics_address,
        "warming worker": settings.warming_worker_metrics_address,
        "bridge": settings.bridge_metrics_address,
        "beat": settings.beat_metrics_address,
    }
    return {process: address for process, address in addresses.items() if address}


def write_env(path: Path, settings: Settings) -> None:
    """Write all settings as ``SEGSVC_NAME='value'`` to a file for its owner alone, completely or not at all."""
    lines = []
    for name, value in settings.model_dump(mode="json").items():
        if value is not None:
            text = " ".join(value) if isinstance(value, list) else str(value)
            quoted = text.replace("\\", "\\\\").replace("'", "\\'")
            lines.append(f"SEGSVC_{name.upper()}='{quoted}'\n")
    write_private(path, "".join(lines))


def write_private(path: Path, text: str) -> None:
    """Write a file for its owner alone, completely or not at all."""
    unfinished = path.with_suffix(".new")
    unfinished.unlink(missing_ok=True)
    unfinished.touch(mode=0o600)
    unfinished.write_text(text)
    unfinished.replace(path)


def read_env(path: Path) -> dict[str, Any]:
    """What ``write_env`` wrote, by field name; the environment has no influence."""
    return {
        name.removeprefix("SEGSVC_").lower(): value
        for name, value in dotenv_values(path, interpolate=False).items()
        if value is not None
    }
