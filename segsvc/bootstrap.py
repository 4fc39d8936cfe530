"""Wiring: the only place where services meet PostgreSQL and the cache. One class for each kind of process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

from segsvc.cache.client import CacheClient
from segsvc.cache.inspector import CacheInspector
from segsvc.cache.keys import Keys
from segsvc.cache.patch_store import PatchStore
from segsvc.cache.readers import make_reader
from segsvc.cache.warm_notes import WarmNotes
from segsvc.config import Settings
from segsvc.domain.condition_cost import CostLimits
from segsvc.domain.installation import Installation
from segsvc.domain.membership import Entry
from segsvc.domain.operation import OperationState, QueueLimits
from segsvc.failpoints import failpoints
from segsvc.fan_out import ThreadFanOut
from segsvc.log import get_logger
from segsvc.metrics import in_doubt_seconds, operations_not_ended_seconds, recovery_alarms
from segsvc.postgres.catalog.event_records import PostgresEventRecords
from segsvc.postgres.catalog.ledger import PostgresLedger
from segsvc.postgres.catalog.maintenance import PostgresMaintainedCatalog
from segsvc.postgres.catalog.outbox import PostgresOutboxStore
from segsvc.postgres.catalog.segments import PostgresSegmentCatalog
from segsvc.postgres.engine import Databases, Pool
from segsvc.postgres.installation import doubling, layout, moving
from segsvc.postgres.installation.check_reads import PostgresCheckReads
from segsvc.postgres.installation.doubling import Doubled
from segsvc.postgres.installation.finder import find_installation
from segsvc.postgres.installation.probes import PostgresProbes
from segsvc.postgres.installation.relocation import refuse_while_switched, relocating
from segsvc.postgres.shard.condition_meter import PostgresMeter
from segsvc.postgres.shard.maintenance import PostgresMaintainedShards
from segsvc.postgres.shard.members import PostgresMemberReader
from segsvc.postgres.shard.memberships import PostgresMemberships
from segsvc.postgres.shard.operation_transaction import PostgresShardSnapshots
from segsvc.postgres.shard.overrides import PostgresOverrideStore
from segsvc.postgres.shard.participant import PostgresParticipant
from segsvc.postgres.shard.statistics import PostgresShardCounter, PostgresUserReader
from segsvc.postgres.shard.user_transaction import PostgresUserStore
from segsvc.postgres.stalls import StallWatch
from segsvc.services.acceptance import Acceptance, Broker
from segsvc.services.check.check import Checker
from segsvc.services.cold_reads import ColdReads, Limits
from segsvc.services.creations import Creations
from segsvc.services.deadlines import DeadlineKeeper
from segsvc.services.end_watcher import OperationEndWatcher
from segsvc.services.explain import ExplainService
from segsvc.services.export import ExportService
from segsvc.services.ingestion import Ingestion
from segsvc.services.maintenance import MaintenanceService
from segsvc.services.operations import OperationService
from segsvc.services.outbox import Outbox, SegmentEventPublisher
from segsvc.services.overrides import OverrideService
from segsvc.services.preview import PreviewService
from segsvc.services.rule_costs import RuleCosts
from segsvc.services.segments import SegmentService
from segsvc.services.shard_work import OperationWork
from segsvc.services.slug_map import SlugMap
from segsvc.services.statistics import StatisticsService
from segsvc.services.users import UserService
from segsvc.services.warming import Warmer
from segsvc.twophase.ports import Dispatcher, Invalidation
from segsvc.twophase.protocol import Coordinator

log = get_logger(__name__)


class TaskSender(Dispatcher, Broker, Protocol):
    """Celery, as far as this package needs it."""


class MetricsObserver:
    """Turns what the protocol reports into metrics, which alert rules watch; alarms go to the log too.

    Implements ``twophase.Observer``.
    """

    def raise_alarm(self, what: str, **where: object) -> None:
        recovery_alarms.labels(what).inc()
        log.error("alarm", what=what, **{key: str(value) for key, value in where.items()})

    def in_doubt(self, shard: int, oldest_s: Mapping[str, float]) -> None:
        for state, age_s in oldest_s.items():
            in_doubt_seconds.labels(shard, state).set(age_s)

    def not_ended(self, oldest_s: Mapping[OperationState, float]) -> None:
        for state, age_s in oldest_s.items():
            operations_not_ended_seconds.labels(state.name).set(age_s)


def installation_of(settings: Settings) -> Installation:
    """The installation that these settings name, as its databases know it. Raises CATALOG_UNAVAILABLE."""
    return find_installation(settings)


WARM_TIMEOUT_S = 5.0
"""Bound of one wait for the cache while warming: no caller waits for it, and its exchanges are large. Half a lease."""

WARM_REST = 1.0
"""The warmer keeps the cache's server busy at most half the time. A server that is never idle has to wait for the
processor like every process that computes, and each read that misses meanwhile waits for the server three times."""


def make_cache(settings: Settings, *, timeout_s: float | None = None, rest: float = 0.0) -> CacheClient:
    """The cache, on all its servers. ``timeout_s`` None: as the settings bound an exchange."""
    return CacheClient(
        settings.cache_url_by_shard or settings.cache_url,
        find_keys=lambda: Keys(installation_of(settings).tag.encode()),
        timeout_s=timeout_s or settings.cache_timeout_s,
        ttl_s=settings.cache_ttl_s,
        rest=rest,
        also=settings.cache_url_also_by_shard,
        patches_max=settings.cache_patches_max,
    )


def cost_limits(settings: Settings) -> CostLimits:
    """Bounds of what the conditions of rules may cost."""
    return CostLimits(settings.condition_cost_max_us, settings.conditions_cost_max_us)


def make_rule_costs(settings: Settings, databases: Databases) -> RuleCosts:
    """Measures the conditions of rules, and holds them to their bounds."""
    return RuleCosts(
        PostgresMeter(databases),
        PostgresSegmentCatalog(databases),
        range(settings.shard_count),
        cost_limits(settings),
    )


def watch_shards(settings: Settings, changed: Callable[[Settings], None] = lambda settings: None) -> layout.LayoutWatch:
    """Watches which shards are in force: see ``segsvc.postgres.installation.layout.LayoutWatch``."""
    return layout.LayoutWatch(settings, changed)


class OperationParts:
    """The commit protocol on PostgreSQL and the cache: fronts and workers both need it."""

    def __init__(
        self, settings: Settings, databases: Databases, invalidation: Invalidation, dispatcher: Dispatcher
    ) -> None:
        crash_points = failpoints(settings.failpoint_dir)
        self.ledger = PostgresLedger(
            databases,
            shard_count=settings.shard_count,
            deadline_s=settings.operation_deadline_s,
            quiet_s=settings.redispatch_quiet_s,
            queue=QueueLimits(settings.queued_operations_max, settings.queued_per_segment_max),
            cost_limits=cost_limits(settings),
            crash_points=crash_points,
        )
        # A visit holds one connection of its shard: with as many threads as shards, all are visited at once.
        self.fan_out = ThreadFanOut(max(1, settings.shard_count))
        work = OperationWork()
        self.coordinator = Coordinator(
            cluster=settings.cluster,
            ledger=self.ledger,
            participants=[
                PostgresParticipant(databases, shard, work, crash_points) for shard in range(settings.shard_count)
            ],
            invalidation=invalidation,
            dispatcher=dispatcher,
            fan_out=self.fan_out,
            observer=MetricsObserver(),
            crash_points=crash_points,
        )


class WorkerServices:
    """What the tasks of one worker process use. Made after the fork."""

    def __init__(self, settings: Settings, *, sender: TaskSender) -> None:
        # A worker process runs one task at a time; its own thread and a fan-out visit may need a connection each.
        self.shard_count = settings.shard_count
        self.databases = Databases(settings, "worker", Pool(2))
        self.cache = make_cache(settings)

        parts = OperationParts(settings, self.databases, self.cache, sender)
        self.ledger = parts.ledger
        self.coordinator = parts.coordinator
        self._fan_out = parts.fan_out
        costs = make_rule_costs(settings, self.databases)
        self.acceptance = Acceptance(store=parts.ledger, coordinator=parts.coordinator, broker=sender, costs=costs)

        self.ingestion = Ingestion(PostgresUserStore(self.databases), self.cache, failpoints(settings.failpoint_dir))

        memberships = PostgresMemberships(self.databases)
        self._warm_cache = make_cache(settings, timeout_s=WARM_TIMEOUT_S, rest=WARM_REST)
        self.warming = Warmer(
            reads=memberships,
            cache=self._warm_cache,
            notes=WarmNotes(self._warm_cache),
            slugs=SlugMap(memberships.slugs),
            budget_bytes=settings.cache_warm_budget_bytes,
            patches_max=settings.cache_patches_max,
        )

        self.maintenance = MaintenanceService(
            catalog=PostgresMaintainedCatalog(self.databases),
            shards=PostgresMaintainedShards(self.databases),
            costs=costs,
            shard_numbers=range(settings.shard_count),
            request_id_ttl_s=settings.request_id_ttl_s,
            tombstone_ttl_s=settings.tombstone_ttl_s,
            fence_ttl_s=settings.fence_ttl_s,
            entries_gone_after_s=self.cache.entries_gone_after_s,
            operation_deadline_s=settings.operation_deadline_s,
        )

    def close(self) -> None:
        self._fan_out.close()
        self._warm_cache.close()
        self.cache.close()
        self.databases.close()


class RecoveryServices:
    """What recovery runs on, in a thread of its own."""

    def __init__(self, settings: Settings, *, dispatcher: Dispatcher) -> None:
        # For each database, the thread's own connection, and one for a fan-out visit.
        self._databases = Databases(settings, "recovery", Pool(2))
        self._cache = make_cache(settings)
        parts = OperationParts(settings, self._databases, self._cache, dispatcher)
        self._coordinator = parts.coordinator
        self._fan_out = parts.fan_out
        self._catalog = PostgresMaintainedCatalog(self._databases)

    def recover(self) -> None:
        """Run recovery once, and note the time in the catalog: ``segsvc doctor`` reads there whether recovery lives.

        Raises:
            ServiceError: the catalog is out of reach, or a shard was; recovery ran for all other shards.
        """
        self._coordinator.recover()
        self._catalog.note_recovery()

    def close(self) -> None:
        self._fan_out.close()
        self._cache.close()
        self._databases.close()


class HotReads:
    """What the hot lane of one front process reads with. Made after the fork.

    Args:
        encode: makes of a slug the bytes that the lane joins into answers.
    """

    STALLED_S = 0.5
    """A cold read that takes this much longer than any statement or connection may is given up."""

    def __init__(self, settings: Settings, *, encode: Callable[[str], bytes]) -> None:
        # One connection for each thread that reads a shard; the sessions bound a statement as reads need it.
        pool = Pool(settings.cold_read_threads, settings.read_timeout_s, by_key=True)
        self._databases = Databases(settings, "reads", pool)
        self._cache = make_cache(settings)

        memberships = PostgresMemberships(self._databases)
        self.slugs = SlugMap(memberships.slugs, encode)
        self.entries = make_reader(
            self._cache,
            settings.shard_count,
            partial=True,
            patches=PatchStore(self.slugs.slug, settings.cache_patch_memory_bytes),
        )
        self.counts = WarmNotes(self._cache)
        self.cold = ColdReads(
            reads=memberships,
            cache=self._cache,
            slugs=self.slugs,
            shard_count=settings.shard_count,
            limits=Limits(
                waiting_max=settings.cold_reads_max,
                threads=settings.cold_read_threads,
                statement_s=settings.read_timeout_s,
                stalled_s=max(settings.read_timeout_s, settings.connect_timeout_s) + self.STALLED_S,
            ),
        )

    def release(self) -> None:
        """Close the connections that no read uses. Reads go on, each with a new one."""
        self._databases.close()

    def close(self, timeout_s: float) -> None:
        """End the cold reads, then everything that they use. The lane must be closed before."""
        self.cold.close(timeout_s)
        self.entries.close()
        self._cache.close()
        self._databases.close()


class FrontServices:
    """What one front process serves with, except for the hot lane. Made after the fork."""

    READ_CONNECTIONS = 8
    """Connections per database for lookups, except cold reads."""
    CHANGE_CONNECTIONS = 8
    """Connections per database for changes, operations and snapshots of a few rows."""
    BULK_CONNECTIONS = 8
    """More connections per database, for calls that count or read all members: these calls have few threads, so they
    never take all the connections that changes need."""

    def __init__(self, settings: Settings, *, sender: TaskSender) -> None:
        # One more: the watcher keeps a connection to the catalog as long as a call waits.
        self.databases = Databases(settings, "front", Pool(self.CHANGE_CONNECTIONS + self.BULK_CONNECTIONS + 1))
        # Connections of their own, so that cheap calls do not wait for expensive ones.
        self._reads = Databases(settings, "front", Pool(self.READ_CONNECTIONS, each_alone=True))
        # Callers of a front have deadlines; a worker's task has none, and goes on when its server does.
        self._stalls = [StallWatch(each, settings.connect_timeout_s) for each in (self.databases, self._reads)]
        self.cache = make_cache(settings)
        parts = OperationParts(settings, self.databases, self.cache, sender)

        # Each kind of visit has threads of its own, as many as shards. A wait for a preview, which takes as long as its
        # condition, or for a shard that hangs, must not delay the commit of a decided operation. And a visit that
        # prepares a shard may end in an abort, which visits all shards itself: it would wait for itself.
        visits = [ThreadFanOut(max(1, settings.shard_count)) for _ in range(3)]
        self._fan_outs = [parts.fan_out, *visits]
        for_statistics, for_previews, for_creations = visits

        self.segments = SegmentService(PostgresSegmentCatalog(self.databases, self._reads))
        self.statistics = StatisticsService(self.segments, PostgresShardCounter(self.databases), for_statistics)
        costs = make_rule_costs(settings, self.databases)
        self.preview = PreviewService(self.segments, PostgresShardSnapshots(self.databases), costs, for_previews)
        self.export = ExportService(self.segments, PostgresMemberReader(self.databases))
        self.users = UserService(PostgresUserReader(self._reads))
        overrides = PostgresOverrideStore(self.databases)
        self.overrides = OverrideService(overrides, self.cache, self.segments, failpoints(settings.failpoint_dir))
        self.explain = ExplainService(overrides)
        self.probes = PostgresProbes(self._reads)

        self.watcher = OperationEndWatcher(parts.ledger)
        shards = range(settings.shard_count)
        self.operations = OperationService(store=parts.ledger, watcher=self.watcher, shards=shards)
        self.acceptance = Acceptance(store=parts.ledger, coordinator=parts.coordinator, broker=sender, costs=costs)
        self.creations = Creations(
            store=parts.ledger,
            acceptance=self.acceptance,
            operations=self.operations,
            coordinator=parts.coordinator,
            shards=shards,
            fan_out=for_creations,
        )
        self._deadlines = DeadlineKeeper(parts.coordinator, interval_s=settings.recovery_interval_s)

    def release(self) -> None:
        """Close the connections that no call uses. Calls go on, each with a new one."""
        self._reads.close()
        self.databases.close()

    def close(self) -> None:
        self._deadlines.close()
        self.watcher.close()
        for fan_out in self._fan_outs:
            fan_out.close()
        self.cache.close()
        for stalls in self._stalls:
            stalls.close()
        self._reads.close()
        self.databases.close()


class OutboxServices:
    """The catalog, as far as publishing segment events needs it."""

    def __init__(self, settings: Settings, *, publisher: SegmentEventPublisher) -> None:
        # The transaction of a claim is idle for as long as Kafka takes to acknowledge what is published.
        self._databases = Databases(settings, "bridge", Pool(1, catalog_idle_s=None))
        self.outbox = Outbox(PostgresOutboxStore(self._databases), publisher)

    def close(self) -> None:
        self._databases.close()


class EventRecords:
    """What the catalog has recorded of Kafka's topics."""

    def __init__(self, settings: Settings) -> None:
        self._databases = Databases(settings, "events", Pool(1))
        self.records = PostgresEventRecords(self._databases)

    def close(self) -> None:
        self._databases.close()


class Inspection:
    """Reads from outside the request path: the number of users, and which users are in the cache."""

    def __init__(self, settings: Settings) -> None:
        self._databases = Databases(settings, "inspection", Pool(1))
        self._reads = PostgresCheckReads(self._databases)
        self._cache = make_cache(settings)
        # Callers look at hits and misses, not at the order of the segments.
        self._reader = make_reader(self._cache, settings.shard_count, partial=False, patches=PatchStore(int))

    def user_count(self) -> int:
        """Users on all shards. Raises SHARD_UNAVAILABLE."""
        total = 0
        for shard in range(self._databases.shard_count):
            with self._reads.shard(shard) as snapshot:
                total += snapshot.state().user_count
        return total

    def cached(self, user_ids: Sequence[int]) -> list[Entry | None]:
        """What the hot reader would answer from the cache now; None: a miss. Raises CACHE_UNAVAILABLE."""
        self._reader.connect()
        return self._reader.lookup(user_ids)

    def close(self) -> None:
        self._reader.close()
        self._cache.close()
        self._databases.close()


def settle_shard(settings: Settings, shard: int, other_dsn: str) -> bool:
    """End the move of a shard: the database that the settings name is the shard from now on, and the other database is
    not.

    In this order: first no process can read the other database any more; then no entry that was read there is left in
    the cache, and no load under way can still fill one; only then are changes allowed. Idempotent.

    Returns:
        Whether the other database is shut; False: it is empty.

    Raises:
        segsvc.postgres.installation.moving.MoveRefused: these two are not the databases of one move.
        ServiceError: UNAVAILABLE, a database or the cache is out of reach. The shard stays closed to writes; run this
            again.
    """
    with relocating(settings) as catalog:
        refuse_while_switched(catalog)
        shut = moving.fence(settings, shard, other_dsn)
        _drop_generations(settings, [shard])
        moving.reopen(settings, shard)
        return shut


def _drop_generations(settings: Settings, shards: Sequence[int]) -> None:
    cache = make_cache(settings)
    try:
        cache.drop_generations(shards)
    finally:
        cache.close()


PATIENCE_S: Final = 10.0
"""How long a doubling waits for processes to leave the old shards: they ask every half second, and events wait."""


def double_shards(settings: Settings, progress: doubling.Progress, *, patience_s: float = PATIENCE_S) -> Doubled:
    """Double the number of shards: see ``segsvc.postgres.installation.doubling.double``."""
    return doubling.double(
        settings,
        lambda shards: _drop_generations(layout.doubled(settings), shards),
        failpoints(settings.failpoint_dir),
        patience_s=patience_s,
        progress=progress,
    )


def undo_doubling(settings: Settings) -> bool:
    """Give up a doubling that is not decided: see ``segsvc.postgres.installation.doubling.undo``."""
    return doubling.undo(settings, failpoints(settings.failpoint_dir))


class Check:
    """What ``segsvc check`` runs on.

    Args:
        with_cache: False leaves the cache out.

    Raises:
        ServiceError: CACHE_UNAVAILABLE.
    """

    def __init__(self, settings: Settings, *, with_cache: bool = True) -> None:
        self._databases = Databases(settings, "check", Pool(1))
        self._cache = make_cache(settings)
        # A patch that is laid over an entry puts its segment in the order of the slugs; the checker learns them.
        self.slugs: dict[int, str] = {}
        patches = PatchStore(self.slugs.__getitem__)
        self.reader = make_reader(self._cache, settings.shard_count, partial=False, patches=patches)
        if with_cache:
            self.reader.connect()
        self.inspector = CacheInspector(self._cache)
        self.reads = PostgresCheckReads(self._databases)
        self.checker = Checker(
            self.reads,
            self.reader if with_cache else None,
            patches=self.inspector,
            notes_kept_s=self._cache.entries_gone_after_s,
            cluster=settings.cluster,
            shard_count=settings.shard_count,
            fence_ttl_s=settings.fence_ttl_s,
            slugs=self.slugs,
        )

    def close(self) -> None:
        self.reader.close()
        self._cache.close()
        self._databases.close()
