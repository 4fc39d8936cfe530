"""Ports of a local stack, and ``stack.env``: all its settings, as the file that every process of it reads."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dotenv import dotenv_values

from segsvc.config import Settings
from segsvc.local.processes import free_ports

# Ports that people expect; others are taken where these are not free.
_PORTS = {
    "grpc_address": 50051,
    "flower_address": 5555,
    # Apart by more than the front has processes, each of which takes the next one.
    "metrics_address": 9464,
    "operation_worker_metrics_address": 9564,
    "event_worker_metrics_address": 9565,
    "warming_worker_metrics_address": 9566,
    "bridge_metrics_address": 9567,
}


def choose_ports(reserved: ExitStack) -> dict[str, int]:
    """A port for each setting of an address: the one that people expect if it is free, another one otherwise.

    No other stack that starts meanwhile chooses one of them, until ``reserved`` is closed: by then they are in use.
    """
    free = free_ports(2 * len(_PORTS), preferred=list(_PORTS.values()), reserved=reserved)
    others = [port for port in free if port not in _PORTS.values()]
    return {name: port if port in free else others.pop() for name, port in _PORTS.items()}


def metrics_addresses(settings: Settings) -> dict[str, str]:
    """Process, as people call it → host:port of its metrics; those that serve none are left out."""
    addresses = {
        "front": settings.metrics_address,
        "operations worker": settings.operation_worker_metrics_address,
        "events worker": settings.event_worker_metrics_address,
        "warming worker": settings.warming_worker_metrics_address,
        "bridge": settings.bridge_metrics_address,
    }
    return {process: address for process, address in addresses.items() if address}


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
