"""Metrics over HTTP: of this process alone, or of a worker and all that it forks, added up.

The latter is prometheus_client's multiprocess mode: every process keeps its values in files of one folder. Where values
live is decided when ``prometheus_client`` is imported, so the variable ``PROMETHEUS_MULTIPROC_DIR`` is set before.
"""

from __future__ import annotations

import os
import re
import struct
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from prometheus_client import REGISTRY, CollectorRegistry, Metric, start_http_server, values
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

_LIVE_GAUGES = re.compile(r"gauge_live[a-z]*_(\d+)\.db")


_SETTLED_WITHIN_S = 2.0
_LOOK_AGAIN_S = 0.02


class MetricsAddressError(Exception):
    """An address is in use, or not this machine's. The text names it."""


@contextmanager
def serving(address: str, registry: CollectorRegistry | None = None) -> Iterator[None]:
    """Serve metrics at ``http://address/metrics`` while the block runs.

    Args:
        address: host:port; an empty one serves nothing.
        registry: what to serve; None: what this process declared.

    Raises:
        MetricsAddressError: nothing can listen there.
    """
    if not address:
        yield
        return
    host, _, port = address.rpartition(":")
    try:
        server, thread = start_http_server(int(port), host.strip("[]"), registry or REGISTRY)
    except OSError as error:
        raise MetricsAddressError(f"metrics on {address}: {error.strerror or error}") from error
    # A child that outlives its parent must not keep the port; closing its copy leaves the parent's alone.
    os.register_at_fork(after_in_child=server.socket.close)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def all_processes(folder: Path) -> CollectorRegistry:
    """The values of all processes whose ``PROMETHEUS_MULTIPROC_DIR`` is this folder.

    Raises:
        RuntimeError: this process imported ``prometheus_client`` before that variable was set.
    """
    if values.ValueClass is values.MutexValue:
        raise RuntimeError("prometheus_client was imported before PROMETHEUS_MULTIPROC_DIR was set")
    registry = CollectorRegistry()
    _AllProcesses(registry, folder)
    return registry


class _AllProcesses(MultiProcessCollector):
    """Forgets the live gauges of processes that have ended, whatever ended them, before it adds the others up."""

    def __init__(self, registry: CollectorRegistry, folder: Path) -> None:
        self._folder = folder
        super().__init__(registry, str(folder))  # type: ignore[no-untyped-call]

    def collect(self) -> Iterable[Metric]:
        """What is served. Counters of processes that have ended stay in: a sum must not shrink."""
        give_up = time.monotonic() + _SETTLED_WITHIN_S
        while True:
            try:
                return self._add_up()
            except (FileNotFoundError, struct.error, ValueError):
                # A process has just made its file and not written its head, or has just ended: a moment's matter.
                if time.monotonic() > give_up:
                    raise
                time.sleep(_LOOK_AGAIN_S)

    def _add_up(self) -> Iterable[Metric]:
        for file in self._folder.iterdir():
            found = _LIVE_GAUGES.fullmatch(file.name)
            if found and not Path(f"/proc/{found[1]}").exists():
                mark_process_dead(int(found[1]), str(self._folder))  # type: ignore[no-untyped-call]
        merged: Iterable[Metric] = super().collect()  # type: ignore[no-untyped-call]
        return merged
