"""Every metric of the service, by name, in one place. Names are stable: dashboards and alert rules use them.

A worker is several processes behind one address (``segsvc.metrics_http``): a gauge's ``multiprocess_mode`` says how
their values are combined.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from segsvc.domain.events import TOPICS

_FAST_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

RPC_BOUNDS_S = (0.0003, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10)
"""Each bound is also a bound of the native front's own histograms, so that its calls fit the same buckets."""

# -- every process --------------------------------------------------------------------------------------------------
build_info = Gauge(
    "segsvc_build_info",
    "Always 1, for each address that serves metrics; the labels say what runs there.",
    ["role", "version", "commit"],
    multiprocess_mode="max",
)
"""role: front, operations, events, warming (workers of that queue), beat, bridge. commit: '' if not known."""

# -- reads (front) --------------------------------------------------------------------------------------------------
reads = Counter("segsvc_reads_total", "Users looked up, by the source of the answer.", ["source"])
"""source: hit (cache), miss (shard, then filled), bypass (shard, not filled), unknown (no such user), error."""
patched_reads = Counter(
    "segsvc_patched_reads_total",
    "Hits whose entry was older than the newest bulk change, so that patches were laid over it.",
)
patch_chunks_fetched = Counter("segsvc_patch_chunks_fetched_total", "Chunks of patches that fronts fetched.")
patch_chunk_bytes = Gauge(
    "segsvc_patch_chunk_bytes", "Memory that the fronts use for chunks of patches.", multiprocess_mode="livesum"
)
cold_read_seconds = Histogram(
    "segsvc_cold_read_seconds", "Duration of one statement that loads users of a shard.", buckets=_FAST_S
)
cold_reads_waiting = Gauge(
    "segsvc_cold_reads_waiting", "Users that wait for a cold read, by shard.", ["shard"], multiprocess_mode="livesum"
)

cache_connected = Gauge(
    "segsvc_cache_connected",
    "Whether the hot lane reads from this cache server: 1 or 0; of several processes, the one that is worst off.",
    ["server"],
    multiprocess_mode="livemin",
)
"""server: host:port."""

# -- RPCs (front) ---------------------------------------------------------------------------------------------------
rpcs = Counter("segsvc_rpcs_total", "Finished calls.", ["method", "code"])
rpc_seconds = Histogram("segsvc_rpc_seconds", "Duration of calls.", ["method"], buckets=RPC_BOUNDS_S)
CODES = ("OK", "DEADLINE_EXCEEDED", "INTERNAL", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "UNKNOWN")
"""Codes that every method serves from the start, at 0, for the same reason as the alarms below."""

# -- access (front) -------------------------------------------------------------------------------------------------
credentials_refused = Counter(
    "segsvc_credentials_refused_total", "Calls whose credentials were refused, by what was wrong with these.", ["why"]
)
CREDENTIAL_FAULTS = (
    "none", "unknown", "expired", "key", "algorithm", "signature", "issuer", "audience", "claims", "not_verified",
)  # fmt: skip
"""none: there were none; unknown: no such token, or no such name of a certificate; key, algorithm, signature, issuer,
audience, claims: of a JWT; not_verified: a JWT that was not looked at, because too many forged ones came."""
for _why in CREDENTIAL_FAULTS:
    # Served as 0 from the start: an alert on a rising counter misses the first event of a counter that starts at 1.
    credentials_refused.labels(_why)
access_file_broken = Gauge(
    "segsvc_access_file_broken",
    "1 while the file that this setting names cannot be used, and its contents before stay in force.",
    ["setting"],
    multiprocess_mode="max",
)

# -- databases (every process) --------------------------------------------------------------------------------------
connections_thrown_away = Counter(
    "segsvc_connections_thrown_away_total",
    "Connections to PostgreSQL that were closed because they were returned to their pool inside a transaction.",
)

# -- operations (workers; a front counts the ones that it creates, aborts or cancels) -------------------------------
operations_finished = Counter("segsvc_operations_finished_total", "Operations that ended.", ["kind", "state"])
"""kind and state: names of the domain's enumerations. The process that made the operation final counts it."""
patches = Counter(
    "segsvc_patches_total", "Patches of a shard's cache after a bulk change, by how their publication ended.", ["end"]
)
"""end: appended; known (a twin had published it); none (the shard's cache was empty); dropped (the patch before it was
missing, so the shard's entries were dropped); failed (the cache or the shard could not be reached, or the cache had no
memory: the entries were dropped, or the operation waits)."""
for _end in ("appended", "known", "none", "dropped", "failed"):
    patches.labels(_end)
patch_bytes = Counter("segsvc_patch_bytes_total", "Bytes of patches that were written to the cache.")
in_doubt_seconds = Gauge(
    "segsvc_in_doubt_seconds",
    "Age of a shard's oldest prepared transaction whose operation is in this state, as of the last recovery run.",
    ["shard", "state"],
    # Recovery may run in different processes over time: the most recent value is the right one.
    multiprocess_mode="mostrecent",
)
"""state: of the operation in the ledger; UNKNOWN: there is no such operation; UNREAD: the catalog did not answer."""
operations_not_ended_seconds = Gauge(
    "segsvc_operations_not_ended_seconds",
    "Age of the oldest operation in this state, as of the last recovery run.",
    ["state"],
    multiprocess_mode="mostrecent",
)
recovery_time = Gauge(
    "segsvc_recovery_timestamp_seconds",
    "End of the last recovery run that reached all databases, in seconds since 1970.",
    multiprocess_mode="max",
)
recovery_alarms = Counter(
    "segsvc_recovery_alarms_total",
    "Findings that recovery must not decide and a person has to look at, by kind.",
    ["what"],
)
ALARMS = ("foreign-prepared", "unknown-prepared", "prepared-after-done", "prepared-lost")
for _what in ALARMS:
    # Served as 0 from the start: an alert on a rising counter misses the first event of a counter that starts at 1.
    recovery_alarms.labels(_what)

# -- events (bridge, workers) ---------------------------------------------------------------------------------------
events = Counter("segsvc_events_total", "Events taken from Kafka, by topic and outcome.", ["topic", "outcome"])
"""outcome: applied, ignored (no effect: a duplicate, or older than an applied one), dead (on the dead-letter topic)."""
for _topic in TOPICS:
    events.labels(_topic, "dead")
events_unreadable = Counter(
    "segsvc_events_unreadable_total",
    "Messages or batches of Kafka that could not be read, by topic and cause.",
    ["topic", "why"],
)
"""why: damaged, codec, inflates, record, too-large, fault; what each means is in ``segsvc.bridge.batches``."""
UNREADABLE_WHYS = ("damaged", "codec", "inflates", "record", "too-large", "fault")
for _topic in TOPICS:
    for _why in UNREADABLE_WHYS:
        # At 0 from the start, as above.
        events_unreadable.labels(_topic, _why)
event_partitions_standing = Gauge(
    "segsvc_event_partitions_standing",
    "Partitions without progress: a message in them cannot be read now, or the broker does not deliver them.",
    multiprocess_mode="livesum",
)
events_lost = Gauge(
    "segsvc_events_lost",
    "Upper bound of the events that Kafka dropped unread and no operator has acknowledged, by topic.",
    ["topic"],
    multiprocess_mode="mostrecent",
)
event_losses = Gauge(
    "segsvc_event_losses",
    "Gaps in the events that no operator has acknowledged, by topic.",
    ["topic"],
    multiprocess_mode="mostrecent",
)
event_lag = Gauge(
    "segsvc_event_lag",
    "Available messages that are not finished yet, by topic and partition.",
    ["topic", "partition"],
    multiprocess_mode="mostrecent",
)
dead_letters_waiting = Gauge(
    "segsvc_dead_letters_waiting",
    "Dead letters that were neither resent nor dismissed, by topic.",
    ["topic"],
    multiprocess_mode="mostrecent",
)
event_batches_in_flight = Gauge(
    "segsvc_event_batches_in_flight", "Batches that the bridge waits for.", multiprocess_mode="livesum"
)

# -- the broker (workers, bridge) -------------------------------------------------------------------------------------
broker_messages_refused = Counter(
    "segsvc_broker_messages_refused_total",
    "Items on the broker that are not valid messages of this installation and were dropped, by kind.",
    ["what"],
)
"""what: unreadable, foreign (a task of another installation), unknown (a task that this release does not have),
failed (a message from which no task could be made)."""
for _what in ("unreadable", "foreign", "unknown", "failed"):
    broker_messages_refused.labels(_what)

# -- warming (workers) ----------------------------------------------------------------------------------------------
warmed = Counter("segsvc_warmed_entries_total", "Cache entries written by the warmer.", ["shard"])
cache_memory_bytes = Gauge(
    "segsvc_cache_memory_bytes",
    "Memory of a cache server, as of the warmer's last run on one of its shards.",
    ["server", "what"],
    multiprocess_mode="mostrecent",
)
"""server: host:port. what: used; limit (the smaller of the warmer's budget and most of the server's maxmemory)."""

# -- which process serves what --------------------------------------------------------------------------------------
ROLES = ("front", "operations", "events", "warming", "beat", "bridge")
SERVED_BY: dict[str, tuple[str, ...]] = {
    "segsvc_reads": ("front",),
    "segsvc_patched_reads": ("front",),
    "segsvc_patch_chunks_fetched": ("front",),
    "segsvc_patch_chunk_bytes": ("front",),
    "segsvc_cold_read_seconds": ("front",),
    "segsvc_cold_reads_waiting": ("front",),
    "segsvc_cache_connected": ("front",),
    "segsvc_rpcs": ("front",),
    "segsvc_rpc_seconds": ("front",),
    "segsvc_credentials_refused": ("front",),
    "segsvc_access_file_broken": ("front",),
    "segsvc_operations_finished": ("front", "operations", "beat"),
    "segsvc_patches": ("front", "operations", "beat"),
    "segsvc_patch_bytes": ("front", "operations", "beat"),
    "segsvc_in_doubt_seconds": ("beat",),
    "segsvc_operations_not_ended_seconds": ("beat",),
    "segsvc_recovery_timestamp_seconds": ("beat",),
    "segsvc_recovery_alarms": ("beat",),
    "segsvc_broker_messages_refused": ("operations", "events", "warming", "bridge"),
    "segsvc_events": ("bridge",),
    "segsvc_event_batches_in_flight": ("bridge",),
    "segsvc_warmed_entries": ("warming",),
    "segsvc_cache_memory_bytes": ("warming",),
}
"""Family → roles of the processes that measure it. The other processes also declare it and would serve it as 0,
which would mean "no problem" from a process that measures nothing. All processes serve a family that is not listed."""


def is_served(family: str, role: str) -> bool:
    """Whether a process of this role serves this family; ``family`` is the name without a series' suffix."""
    return role in SERVED_BY.get(family, ROLES)
