"""The gRPC front: one process, or several behind one port.

    native front    clients → NativeGrpcFront ─ hot methods → hot lane
                                              ├ exports, watches → their servicers, with back-pressure
                                              └ all others → grpcio on an unlinked Unix socket
    grpcio front    clients → grpcio (TLS if configured): all methods, the hot ones handed to the same lane

The front starts without PostgreSQL and Redis: while they cannot be reached, calls are answered UNAVAILABLE.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import uvloop
from google.longrunning import operations_pb2, operations_pb2_grpc
from google.protobuf.descriptor import ServiceDescriptor
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2
from pygrpc_native import NativeGrpcFront
from segmentation.v1 import (
    membership_pb2,
    membership_pb2_grpc,
    segments_pb2,
    segments_pb2_grpc,
)
from segmentation.v1 import operations_pb2 as watch_pb2
from segmentation.v1 import operations_pb2_grpc as watch_pb2_grpc

from grpc_api.access import Gate
from grpc_api.call_scope import BlockingCalls
from grpc_api.health import HealthMonitor, HealthServicer
from grpc_api.hot.calls import EXPORT_SEGMENT_USERS, MESSAGE_BYTES_MAX, STREAMS, WATCH_OPERATION, native_front
from grpc_api.hot.lane import HotLane
from grpc_api.hot.metrics import hot_calls
from grpc_api.hot.wire import encode_slug
from grpc_api.interceptors import OneMessage, interceptors
from grpc_api.memory_watch import MemoryWatch
from grpc_api.native_streams import NativeStreams, with_interceptors
from grpc_api.places import Places
from grpc_api.processes import PreforkParent
from grpc_api.servicers.membership import MembershipServicer, Submit
from grpc_api.servicers.operations import OperationsServicer, WatchServicer
from grpc_api.servicers.segments import SegmentServicer
from grpc_api.watching import OperationWatch
from segsvc.access.authenticator import Authenticator
from segsvc.access.files import AccessFileError
from segsvc.bootstrap import FrontServices, HotReads, TaskSender, watch_shards
from segsvc.config import Settings, on_loopback
from segsvc.domain.errors import ServiceError
from segsvc.log import get_logger
from segsvc.metrics_http import MetricsAddressError, of_role, serving

DRAIN_S = 10.0
"""Longest time that calls in progress get to end after SIGTERM; calls that wait for an operation answer at once."""
LANE_DRAIN_S = 3.0
"""Longest time that reads of shards get to end after that."""
METADATA_BYTES_MAX = 16 << 10
IDENTITY_ONLY = 1
"""Bits of the compression algorithms that grpcio accepts: none. It inflates a message whole before it checks its size,
four megabytes to four gigabytes; with an algorithm that is not allowed it inflates nothing."""
READING_THREADS, READING_WAITING_MAX = 16, 1024
CHANGE_THREADS, CHANGE_WAITING_MAX = 16, 256
CREATION_THREADS, CREATION_WAITING_MAX = 64, 256
BULK_THREADS, BULK_WAITING_MAX = 4, 256
PREVIEW_THREADS, PREVIEW_WAITING_MAX = 4, 64
EXPORTS_MAX, EXPORTS_PER_CALLER_MAX = 32, 16
"""Exports that may be open at once, in all and from one address. Each costs memory for a batch, and for another batch
on its way to the client."""
EXPORT_THREADS, EXPORT_WAITING_MAX = 4, EXPORTS_MAX
WATCHES_MAX, WATCHES_PER_CALLER_MAX = 2048, 1024
"""Watches of operations that may be open at once, as for exports. One read of the ledger serves all of them."""

OPEN_REFUSED = (
    "{address}: without SEGSVC_AUTH the front serves this machine alone (127.0.0.1 or [::1]); set SEGSVC_AUTH to "
    "tokens, jwt or mtls, or SEGSVC_ALLOW_OPEN=1 to let everybody in who reaches it"
)
"""Why a front that everybody could call does not start."""

_log = get_logger(__name__)

MakeSender = Callable[[Settings], TaskSender]
"""Makes the connection to Celery; called after the fork."""


class ListenError(Exception):
    """The front cannot serve: an address cannot be listened on, or a file that it needs cannot be used. The text says
    which, and why."""


def serve(settings: Settings, *, make_sender: MakeSender) -> int:
    """Serve until SIGTERM or SIGINT, in as many processes as the settings say.

    Returns:
        The exit code: 0 after a signal, 1 if an address cannot be listened on (the log says which).
    """
    if is_open_to_others(settings):
        _log.error("cannot_listen", reason=OPEN_REFUSED.format(address=settings.grpc_address))
        return 1
    _raise_open_files()
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_no_departure)
    if settings.front_processes == 1:
        return _serve_one(settings, make_sender)
    return PreforkParent(settings.front_processes, partial(_serve_one, settings, make_sender)).run()


def is_open_to_others(settings: Settings) -> bool:
    """Whether everybody who reaches this machine could call, without credentials and without having been allowed to."""
    return settings.auth == ("none",) and not settings.allow_open and not on_loopback(settings.grpc_address)


def _raise_open_files() -> None:
    """Raise the soft limit of open files to the hard one: the usual soft limit, 1024, is meant for programs that use
    select()."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    _log.info("open_files", limit=hard)


def _is_no_departure(record: logging.LogRecord) -> bool:
    """Whether a line of grpcio's log is about anything but a client that left before its message could be sent.

    Such a departure is no fault, and is counted as CANCELLED; grpcio logs it as an error with a traceback.
    """
    return not record.getMessage().startswith("ExecuteBatchError raised in core by servicer method")


def _serve_one(settings: Settings, make_sender: MakeSender, index: int = 0, parent_gone: int | None = None) -> int:
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_run(settings, make_sender, index, parent_gone))
    except ListenError as error:
        _log.error("cannot_listen", reason=str(error))  # the traceback would add nothing
        return 1
    return 0


async def _run(settings: Settings, make_sender: MakeSender, index: int, parent_gone: int | None) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if parent_gone is not None:

        def orphaned() -> None:
            # No parent is left that would restart or stop this process.
            loop.remove_reader(parent_gone)
            stop.set()

        loop.add_reader(parent_gone, orphaned)

    async with contextlib.AsyncExitStack() as stack:
        await FrontProcess(settings, make_sender, index).start(stack)
        # What a front has at its start stays for good. A full collection that visits all of it again (modules,
        # tables, message types) stops the hot lane for some tens of milliseconds, and frees nothing.
        gc.collect()
        gc.freeze()

        await stop.wait()
        _log.info("draining", seconds_max=DRAIN_S)
    _log.info("stopped")


class FrontProcess:
    """One process of the front.

    Args:
        index: 0 … front_processes - 1; metrics are served on the configured port plus this.
    """

    def __init__(self, settings: Settings, make_sender: MakeSender, index: int) -> None:
        self._make_sender = make_sender
        self._index = index
        self._shards = watch_shards(settings, self._follow_shards)
        self._settings = self._shards.settings
        self._services = FrontServices(self._settings, sender=make_sender(self._settings))
        self._hot: HotReads | None = None
        self._lane: HotLane | None = None
        self._leaving = contextlib.ExitStack()
        # Pools by the cost of calls: expensive calls must not delay cheap ones, or calls that change something.
        self._reading = self._threads_for("reading", READING_THREADS, READING_WAITING_MAX)
        self._changes = self._threads_for("changes", CHANGE_THREADS, CHANGE_WAITING_MAX)
        self._creations = self._threads_for("creations", CREATION_THREADS, CREATION_WAITING_MAX)
        self._bulk = self._threads_for("bulk", BULK_THREADS, BULK_WAITING_MAX)
        self._previews = self._threads_for("previews", PREVIEW_THREADS, PREVIEW_WAITING_MAX)
        self._exports = self._threads_for("exports", EXPORT_THREADS, EXPORT_WAITING_MAX)
        self._health = HealthServicer()
        self._authenticator = None if settings.auth == ("none",) else _authenticator(settings)
        self._gate = Gate(self._authenticator, _methods(reflected=settings.grpc_reflection))

    def _threads_for(self, name: str, threads: int, waiting_max: int) -> BlockingCalls:
        return BlockingCalls(name, threads=threads, waiting_max=waiting_max, bound_s=self._settings.statement_timeout_s)

    async def start(self, stack: contextlib.AsyncExitStack) -> None:
        """Start serving; what was started is stopped, in the reverse order, when the stack unwinds.

        Raises:
            ListenError: an address is in use, or not this machine's.
        """
        stack.callback(self._close_services)
        stack.callback(self._leaving.close)
        if self._authenticator is not None:
            self._authenticator.start()
            stack.push_async_callback(asyncio.to_thread, self._authenticator.close)
        native = self._make_native_front()
        self._serve_metrics(stack, native)

        segments, watches = self._make_segment_servicer(), self._make_watch_servicer()
        streams = await _native_streams(native, segments, watches, self._gate) if native is not None else None
        lane = await self._start_lane(stack, native, streams)

        server = self._make_server(segments, watches, lane.submit if native is None else None)
        if native is None:
            self._listen(server)
        else:
            native.set_fallback(_listen_on_unlinked_socket(server, stack))

        port = native.bound_port if native is not None else int(self._settings.grpc_address.rpartition(":")[2])
        watch = MemoryWatch(port, self._settings.front_memory_max_bytes)
        watch.start()
        stack.push_async_callback(asyncio.to_thread, watch.close)

        monitor = self._make_monitor()
        await monitor.start()
        await server.start()
        stack.push_async_callback(_drain, server, streams)

        # Unwound before the server stops: calls that wait for an operation answer now, so draining is short.
        stack.push_async_callback(asyncio.to_thread, self._end_waits)
        stack.push_async_callback(monitor.stop)

        if native is not None:
            native.start()
        self._shards.start()
        stack.push_async_callback(asyncio.to_thread, self._shards.close)
        _log.info(
            "listening",
            address=self._settings.grpc_address,
            front=self._settings.grpc_front,
            process=self._index,
        )

    def _make_native_front(self) -> NativeGrpcFront | None:
        """The front that hands hot calls to the lane; None: grpcio serves everything."""
        if self._settings.grpc_front != "native":
            return None
        address = self._settings.grpc_address
        try:
            return native_front(
                address,
                reuse_port=self._settings.front_processes > 1,
                checked_header=self._settings.grpc_checked_header,
            )
        except OSError as error:
            raise ListenError(f"{address}: {error}") from error

    async def _start_lane(
        self, stack: contextlib.AsyncExitStack, native: NativeGrpcFront | None, streams: NativeStreams | None
    ) -> HotLane:
        hot = self._hot = HotReads(self._settings, encode=encode_slug)
        stack.push_async_callback(asyncio.to_thread, self._close_hot)

        lane = self._lane = HotLane(
            front=native,
            gate=self._gate,
            entries=hot.entries,
            counts=hot.counts,
            cold=hot.cold,
            slugs=hot.slugs,
            shard_count=self._settings.shard_count,
            streams=streams,
            checked_header=self._settings.grpc_checked_header,
        )

        # The lane connects to the cache, which may take a moment while the cache is down.
        await asyncio.to_thread(lane.start)
        stack.push_async_callback(asyncio.to_thread, lane.close, LANE_DRAIN_S)
        return lane

    def _follow_shards(self, settings: Settings) -> None:
        """Serve from the doubled shards from now on. On the watch's thread; calls go on meanwhile.

        A call that has begun ends with the old services, which are closed a while later. Their idle connections are
        closed at once: the command that doubles the shards waits for that.
        """
        hot = HotReads(settings, encode=encode_slug)
        with contextlib.suppress(ServiceError):  # the lane tries again, and reads from the shards meanwhile
            hot.entries.connect()
        services = FrontServices(settings, sender=self._make_sender(settings))

        old_services, old_hot = self._services, self._hot
        self._services, self._hot = services, hot
        if self._lane is not None:
            self._lane.change(
                entries=hot.entries,
                counts=hot.counts,
                cold=hot.cold,
                slugs=hot.slugs,
                shard_count=settings.shard_count,
            )

        old_services.release()
        if old_hot is not None:
            old_hot.release()
        self._close_later(old_services, old_hot)

    def _end_waits(self) -> None:
        self._services.creations.close()
        self._services.watcher.close()

    def _close_later(self, services: FrontServices, hot: HotReads | None) -> None:
        """Close what calls may still use: after the time that calls in progress get to end, or with this process."""
        closed = threading.Lock()

        def close() -> None:
            if not closed.acquire(blocking=False):
                return  # the other of the two has done it
            services.close()
            if hot is not None:
                hot.close(LANE_DRAIN_S)

        timer = threading.Timer(DRAIN_S, close)
        timer.daemon = True
        self._leaving.callback(close)
        self._leaving.callback(timer.cancel)
        timer.start()

    def _close_hot(self) -> None:
        if self._hot is not None:
            self._hot.close(LANE_DRAIN_S)

    @property
    def _following(self) -> Any:
        """The services by name, looked up at each use: they are replaced when the shards have doubled."""
        return _Following(lambda: self._services)

    def _make_segment_servicer(self) -> SegmentServicer:
        services = self._following
        return SegmentServicer(
            segments=services.segments,
            statistics=services.statistics,
            preview=services.preview,
            export=services.export,
            acceptance=services.acceptance,
            creations=services.creations,
            operations=services.operations,
            reading=self._reading,
            changes=self._changes,
            creating=self._creations,
            bulk=self._bulk,
            previews=self._previews,
            exports=self._exports,
            export_places=Places("exports", total=EXPORTS_MAX, per_caller=EXPORTS_PER_CALLER_MAX),
        )

    def _make_watch_servicer(self) -> WatchServicer:
        places = Places("watches", total=WATCHES_MAX, per_caller=WATCHES_PER_CALLER_MAX)
        return WatchServicer(OperationWatch(self._following.operations, self._reading), places)

    def _make_server(self, segments: SegmentServicer, watches: WatchServicer, submit: Submit | None) -> aio.Server:
        services = self._following
        server = aio.server(
            interceptors=[OneMessage(), *interceptors(_methods(), self._gate)],
            options=self._options(),
        )

        segments_pb2_grpc.add_SegmentServiceServicer_to_server(segments, server)
        membership_pb2_grpc.add_MembershipServiceServicer_to_server(
            MembershipServicer(
                users=services.users,
                overrides=services.overrides,
                explain=services.explain,
                reading=self._reading,
                changes=self._changes,
                submit=submit,
            ),
            server,
        )

        watch_pb2_grpc.add_OperationServiceServicer_to_server(watches, server)
        operations_pb2_grpc.add_OperationsServicer_to_server(  # type: ignore[no-untyped-call]
            OperationsServicer(services.operations, services.acceptance, self._reading, self._changes), server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)

        if self._settings.grpc_reflection:
            names = [service.full_name for service in _services()]
            reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], server)
        return server

    def _options(self) -> list[tuple[str, Any]]:
        return [
            ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
            ("grpc.max_metadata_size", METADATA_BYTES_MAX),
            ("grpc.compression_enabled_algorithms_bitset", IDENTITY_ONLY),
            # Clients may send keepalive pings often, as with the native front; grpcio's default ends the connection,
            # and all calls on it, after three pings within five minutes.
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 1000),
            ("grpc.http2.max_ping_strikes", 0),
            # Off for a single process: a second server on the port would share its calls instead of failing.
            ("grpc.so_reuseport", int(self._settings.front_processes > 1)),
        ]

    def _listen(self, server: aio.Server) -> None:
        address = self._settings.grpc_address
        try:
            if self._settings.grpc_tls_cert and self._settings.grpc_tls_key:
                server.add_secure_port(
                    address,
                    _tls(self._settings.grpc_tls_key, self._settings.grpc_tls_cert, self._settings.grpc_tls_client_ca),
                )
            else:
                server.add_insecure_port(address)
        except (OSError, RuntimeError) as error:
            raise ListenError(f"{address}: {error}") from error

    def _serve_metrics(self, stack: contextlib.AsyncExitStack, native: NativeGrpcFront | None) -> None:
        """Prometheus metrics by HTTP; each process has its own numbers, so each has its own port."""
        if not self._settings.metrics_address:
            return
        host, _, port = self._settings.metrics_address.rpartition(":")
        served = of_role("front") if native is None else of_role("front", complete=hot_calls(native))
        try:
            address = f"{host}:{int(port) + self._index}"
            stack.enter_context(serving(address, served, token=self._settings.metrics_token))
        except MetricsAddressError as error:
            raise ListenError(str(error)) from error

    def _make_monitor(self) -> HealthMonitor:
        # After a doubling these are half of the shards, which is enough to know whether any shard is alive.
        shards = range(self._settings.shard_count)
        return HealthMonitor(self._health, self._probe_catalog, [partial(self._probe_shard, shard) for shard in shards])

    def _probe_catalog(self, timeout_s: float) -> None:
        self._services.probes.catalog(timeout_s)

    def _probe_shard(self, shard: int, timeout_s: float) -> None:
        self._services.probes.shard(shard, timeout_s)

    def _close_services(self) -> None:
        for threads in (self._reading, self._changes, self._creations, self._bulk, self._previews, self._exports):
            threads.close()
        self._services.close()


def _tls(key: Path, chain: Path, client_ca: Path | None) -> grpc.ServerCredentials:
    """The front's side of TLS. With authorities of clients, a client without a certificate of theirs cannot connect.

    Raises:
        OSError: a file cannot be read.
    """
    pairs = [(key.read_bytes(), chain.read_bytes())]
    if client_ca is None:
        return grpc.ssl_server_credentials(pairs)
    return grpc.ssl_server_credentials(pairs, client_ca.read_bytes(), require_client_auth=True)


class _Following:
    """An object whose attributes are those of another one, found at each use. ``depth``: how many attributes deep."""

    def __init__(self, find: Callable[[], Any], depth: int = 1) -> None:
        self._find = find
        self._depth = depth

    def __getattr__(self, name: str) -> Any:
        if self._depth:
            return _Following(lambda: getattr(self._find(), name), self._depth - 1)
        return getattr(self._find(), name)


async def _drain(server: aio.Server, streams: NativeStreams | None) -> None:
    """Let calls of the server and of the streams end by themselves, both within the same time."""
    async with asyncio.TaskGroup() as both:
        both.create_task(server.stop(DRAIN_S))
        if streams is not None:
            both.create_task(streams.close(DRAIN_S))


async def _native_streams(
    front: NativeGrpcFront, segments: SegmentServicer, watches: WatchServicer, gate: Gate
) -> NativeStreams:
    """The streams that the native front itself serves, with the servicers inside the same interceptors."""
    export = grpc.unary_stream_rpc_method_handler(
        segments.ExportSegmentUsers,
        segments_pb2.ExportSegmentUsersRequest.FromString,
        segments_pb2.ExportSegmentUsersResponse.SerializeToString,
    )

    watch = grpc.unary_stream_rpc_method_handler(
        watches.WatchOperation,
        watch_pb2.WatchOperationRequest.FromString,
        watch_pb2.WatchOperationResponse.SerializeToString,
    )

    around = interceptors(_methods(), gate)
    handlers = {EXPORT_SEGMENT_USERS: export, WATCH_OPERATION: watch}
    return NativeStreams(front, [await with_interceptors(handlers[method], method, around) for method in STREAMS])


def _listen_on_unlinked_socket(server: aio.Server, stack: contextlib.AsyncExitStack) -> str:
    """Let grpcio listen on a Unix socket that only this process can find. Returns a path to connect to.

    A process that reaches the socket bypasses the front, and a killed front cannot clean up. So the name is removed as
    soon as the socket exists, and the socket is reached through a descriptor of its file. Its folder is reached through
    a descriptor, too: a socket's path has at most 107 bytes, and the temporary folder's own path may be longer.
    """
    with tempfile.TemporaryDirectory(prefix="segsvc-front-") as folder:
        place = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            path = f"/proc/self/fd/{place}/grpcio.sock"
            server.add_insecure_port(f"unix:{path}")
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        finally:
            os.close(place)

    stack.callback(os.close, descriptor)
    return f"/proc/self/fd/{descriptor}"


def _services() -> list[ServiceDescriptor]:
    """All services except reflection."""
    files = (segments_pb2, membership_pb2, watch_pb2, operations_pb2, health_pb2)
    return [service for file in files for service in file.DESCRIPTOR.services_by_name.values()]


def _methods(*, reflected: bool = False) -> list[str]:
    """Full names of all methods, as they come in a request's path. ``reflected``: with those of reflection."""
    services = [*_services(), *(reflection_pb2.DESCRIPTOR.services_by_name.values() if reflected else ())]
    return [f"/{service.full_name}/{method.name}" for service in services for method in service.methods]


def _authenticator(settings: Settings) -> Authenticator:
    """Raises ListenError: a file that says whom to believe cannot be used."""
    try:
        return Authenticator(settings)
    except AccessFileError as error:
        raise ListenError(str(error)) from error
