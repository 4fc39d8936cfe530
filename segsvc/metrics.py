"""Every metric of the service, by name, in one place. Names are stable: dashboards and alert rules use them.

A worker is several processes behind one address (``segsvc.metrics_http``): a gauge's ``multiprocess_mode`` says what
their values make together.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from segsvc.domain.events import TOPICS

_FAST_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

RPC_BOUNDS_S = (0.0003, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10)
"""Each is a bound of the native front's own histograms, too, so that its calls can be counted in the same buckets."""

# -- every process --------------------------------------------------------------------------------------------------
build_info = Gauge(
    "segsvc_build_info",
    "1 for each address that serves metrics: what runs there.",
    ["role", "version", "commit"],
    multiprocess_mode="max",
)
"""role: front, operations, events, warming (workers of that queue), beat, bridge. commit: '' if it is not known."""

# -- reads (front) --------------------------------------------------------------------------------------------------
reads = Counter("segsvc_reads_total", "Users looked up, by where the answer came from.", ["source"])
"""source: hit (cache), miss (shard, then filled), bypass (shard, not filled), unknown (no such user), error."""
cold_read_seconds = Histogram("segsvc_cold_read_seconds", "One statement that loads users of a shard.", buckets=_FAST_S)
cold_reads_waiting = Gauge(
    "segsvc_cold_reads_waiting", "Users that wait for a cold read.", ["shard"], multiprocess_mode="livesum"
)

# -- RPCs (front) ---------------------------------------------------------------------------------------------------
rpcs = Counter("segsvc_rpcs_total", "Finished calls.", ["method", "code"])
rpc_seconds = Histogram("segsvc_rpc_seconds", "Duration of calls.", ["method"], buckets=RPC_BOUNDS_S)
CODES = ("OK", "DEADLINE_EXCEEDED", "INTERNAL", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "UNKNOWN")
"""Codes that each method has from the start, at 0, for the same reason as the alarms below."""

# -- databases (every process) --------------------------------------------------------------------------------------
connections_thrown_away = Counter(
    "segsvc_connections_thrown_away_total",
    "Connections to PostgreSQL that came back to their pool inside a transaction, and were closed.",
)

# -- operations (workers; those that a front creates, aborts or cancels are counted there) --------------------------
operations_finished = Counter("segsvc_operations_finished_total", "Operations that ended.", ["kind", "state"])
"""kind and state: names of the enumerations of the domain. Whoever made the operation final counts it."""
in_doubt_seconds = Gauge(
    "segsvc_in_doubt_seconds",
    "Age of the oldest prepared transaction of a shard whose operation is in this state, as recovery last saw it.",
    ["shard", "state"],
    # Recovery runs in one process of a worker now and in another one then: what the last of them saw is true.
    multiprocess_mode="mostrecent",
)
"""state: of the ledger; UNKNOWN: there is no such operation; UNREAD: the catalog could not be asked."""
operations_not_ended_seconds = Gauge(
    "segsvc_operations_not_ended_seconds",
    "For how long the operation that has been in this state longest has been, as recovery last saw it.",
    ["state"],
    multiprocess_mode="mostrecent",
)
recovery_time = Gauge(
    "segsvc_recovery_timestamp_seconds",
    "When recovery last ran to its end with everything in reach, in seconds since 1970.",
    multiprocess_mode="max",
)
recovery_alarms = Counter("segsvc_recovery_alarms_total", "Things recovery must not decide; look at them.", ["what"])
ALARMS = ("foreign-prepared", "unknown-prepared", "prepared-after-done", "prepared-lost")
for _what in ALARMS:
    # At 0 from the start: a rule that watches a counter rise does not see one that begins at 1.
    recovery_alarms.labels(_what)

# -- events (bridge, workers) ---------------------------------------------------------------------------------------
events = Counter("segsvc_events_total", "Events taken from Kafka, by topic and outcome.", ["topic", "outcome"])
"""outcome: applied, ignored (no effect: a duplicate, or overtaken by a newer one), dead (on the dead-letter topic)."""
for _topic in TOPICS:
    events.labels(_topic, "dead")
events_unreadable = Counter(
    "segsvc_events_unreadable_total",
    "Messages or batches of Kafka that could not be read, by topic and why.",
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
    "Partitions that stand still: something in them cannot be read for now, or the broker does not give them out.",
    multiprocess_mode="livesum",
)
events_lost = Gauge(
    "segsvc_events_lost",
    "Events that Kafka dropped unread and nobody has acknowledged yet, by topic: at most so many.",
    ["topic"],
    multiprocess_mode="mostrecent",
)
event_losses = Gauge(
    "segsvc_event_losses",
    "Gaps in the events that nobody has acknowledged yet, by topic.",
    ["topic"],
    multiprocess_mode="mostrecent",
)
event_lag = Gauge(
    "segsvc_event_lag",
    "Messages that could be read and are not finished, by topic and partition.",
    ["topic", "partition"],
    multiprocess_mode="mostrecent",
)
dead_letters_waiting = Gauge(
    "segsvc_dead_letters_waiting",
    "Dead letters that were neither sent again nor dismissed, by topic.",
    ["topic"],
    multiprocess_mode="mostrecent",
)
event_batches_in_flight = Gauge(
    "segsvc_event_batches_in_flight", "Batches that the bridge waits for.", multiprocess_mode="livesum"
)

# -- the broker (workers) -------------------------------------------------------------------------------------------
broker_messages_refused = Counter(
    "segsvc_broker_messages_refused_total",
    "Things on the broker that are not messages of ours, and were thrown away, by what they are.",
    ["what"],
)
"""what: unreadable, foreign (a task of another installation), unknown (a task that this release does not have),
failed (a message that nobody could make a task of)."""
for _what in ("unreadable", "foreign", "unknown", "failed"):
    broker_messages_refused.labels(_what)

# -- warming (workers) ----------------------------------------------------------------------------------------------
warmed = Counter("segsvc_warmed_entries_total", "Cache entries written by the warmer.", ["shard"])
cache_memory_bytes = Gauge(
    "segsvc_cache_memory_bytes",
    "Memory of the cache's server, as the warmer last saw it.",
    ["what"],
    multiprocess_mode="mostrecent",
)
"""what: used; limit (the lesser of the warmer's budget and most of the server's maxmemory)."""

# -- which process serves what --------------------------------------------------------------------------------------
ROLES = ("front", "operations", "events", "warming", "beat", "bridge")
SERVED_BY: dict[str, tuple[str, ...]] = {
    "segsvc_reads": ("front",),
    "segsvc_cold_read_seconds": ("front",),
    "segsvc_cold_reads_waiting": ("front",),
    "segsvc_rpcs": ("front",),
    "segsvc_rpc_seconds": ("front",),
    "segsvc_operations_finished": ("front", "operations", "beat"),
    "segsvc_in_doubt_seconds": ("beat",),
    "segsvc_operations_not_ended_seconds": ("beat",),
    "segsvc_recovery_timestamp_seconds": ("beat",),
    "segsvc_recovery_alarms": ("beat",),
    "segsvc_broker_messages_refused": ("operations", "events", "warming"),
    "segsvc_events": ("bridge",),
    "segsvc_event_batches_in_flight": ("bridge",),
    "segsvc_warmed_entries": ("warming",),
    "segsvc_cache_memory_bytes": ("warming",),
}
"""Family → roles of the processes that measure it. Others know its name and would serve it as 0, which says that all is
well where nobody looks. What is not here is served by all."""


def is_served(family: str, role: str) -> bool:
    """Whether a process of this role serves what is measured under this name, without the ending of a series."""
    return role in SERVED_BY.get(family, ROLES)
