"""Metrics over HTTP: of this process alone, or the sum of a worker and all processes that it forks. Beside them,
``/health`` says whether the process does its work.

The sum uses prometheus_client's multiprocess mode: every process keeps its values in files of one folder. The library
decides where values are kept when it is imported, so the variable ``PROMETHEUS_MULTIPROC_DIR`` must be set before.
"""

from __future__ import annotations

import hmac
import os
import re
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, CollectorRegistry, Metric, start_http_server, values
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

import segsvc
from segsvc import metrics

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

_LIVE_GAUGES = re.compile(r"gauge_live[a-z]*_(\d+)\.db")

_RETRY_FOR_S = 2.0
_RETRY_AFTER_S = 0.02


class MetricsAddressError(Exception):
    """The address is in use, or belongs to another machine. The text names it."""


Health = Callable[[], str | None]
"""Returns what is wrong with this process, as a text; None: nothing is wrong."""


@contextmanager
def serving(
    address: str, registry: CollectorRegistry | None = None, *, health: Health | None = None, token: str = ""
) -> Iterator[None]:
    """Serve metrics at ``http://address/metrics`` while the block runs.

    Args:
        address: host:port; an empty one serves nothing.
        registry: the metrics to serve; None: the ones that this process declared.
        health: called for ``/health``, which answers 200 if nothing is wrong, else 503 with the text. None: there is no
            ``/health``.
        token: the bearer token that readers of metrics must send; empty: none is needed. ``/health`` needs none.

    Raises:
        MetricsAddressError: the server cannot listen on the address.
    """
    if not address:
        yield
        return

    host, _, port = address.rpartition(":")
    try:
        server, thread = start_http_server(int(port), host.strip("[]"), registry or REGISTRY)
    except OSError as error:
        raise MetricsAddressError(f"metrics on {address}: {error.strerror or error}") from error

    app = server.get_app()
    if app is not None:
        if token:
            app = _guarded(app, token)
        if health is not None:
            app = _with_health(app, health)
        server.set_app(app)

    # A child that outlives its parent must not keep the port. Closing the child's copy does not affect the parent's.
    os.register_at_fork(after_in_child=server.socket.close)

    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def of_role(
    role: str, registry: CollectorRegistry | None = None, complete: Callable[[Metric], None] = lambda family: None
) -> CollectorRegistry:
    """The metrics that a process of this role serves.

    Args:
        role: one of ``metrics.ROLES``.
        registry: source of the values; None: the registry of this process.
        complete: adds to a family the values that are counted elsewhere.
    """
    metrics.build_info.labels(role, segsvc.__version__, os.environ.get("SEGSVC_COMMIT", "")).set(1)
    served = CollectorRegistry()
    served.register(_OfRole(role, registry or REGISTRY, complete))
    return served


class _OfRole(Collector):
    """Leaves out the metrics that only other processes measure."""

    def __init__(self, role: str, registry: CollectorRegistry, complete: Callable[[Metric], None]) -> None:
        self._role = role
        self._registry = registry
        self._complete = complete

    def describe(self) -> Iterable[Metric]:
        """Nothing. Without this, a registry would collect all values to learn the names."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """The served families."""
        for family in self._registry.collect():
            if metrics.is_served(family.name, self._role):
                self._complete(family)
                yield family


def _guarded(metrics_app: WSGIApplication, token: str) -> WSGIApplication:
    """The app for those who send this bearer token."""
    wanted = f"Bearer {token}".encode()

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        given = environ.get("HTTP_AUTHORIZATION", "").encode("latin-1", "replace")
        # In a time that does not tell how much of it is right.
        if hmac.compare_digest(given, wanted):
            return metrics_app(environ, start_response)
        start_response("401 Unauthorized", [("Content-Type", "text/plain"), ("WWW-Authenticate", "Bearer")])
        return [b"metrics need a token\n"]

    return app


def _with_health(metrics_app: WSGIApplication, health: Health) -> WSGIApplication:
    """An app that answers ``/health`` and passes all other requests to ``metrics_app``."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ.get("PATH_INFO") != "/health":
            return metrics_app(environ, start_response)

        complaint = health()
        status = "200 OK" if complaint is None else "503 Service Unavailable"
        start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{complaint or 'ok'}\n".encode()]

    return app


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
    """Removes the live gauges of processes that have ended, whatever ended them, before it sums up the rest."""

    def __init__(self, registry: CollectorRegistry, folder: Path) -> None:
        self._folder = folder
        super().__init__(registry, str(folder))  # type: ignore[no-untyped-call]

    def collect(self) -> Iterable[Metric]:
        """The served families. Counters of ended processes stay included: a sum must not shrink."""
        give_up = time.monotonic() + _RETRY_FOR_S
        while True:
            try:
                return self._add_up()
            except (FileNotFoundError, struct.error, ValueError):
                # A process has just created its file without its header, or has just ended. Both pass within moments.
                if time.monotonic() > give_up:
                    raise
                time.sleep(_RETRY_AFTER_S)

    def _add_up(self) -> Iterable[Metric]:
        for file in self._folder.iterdir():
            found = _LIVE_GAUGES.fullmatch(file.name)
            if found and not Path(f"/proc/{found[1]}").exists():
                mark_process_dead(int(found[1]), str(self._folder))  # type: ignore[no-untyped-call]

        merged: Iterable[Metric] = super().collect()  # type: ignore[no-untyped-call]
        return merged
