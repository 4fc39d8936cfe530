"""The declared schema. A test proves that the sum of the migrations equals it.

``catalog`` is one database, ``shard`` the schema of each of the N. Times are ``timestamptz``, salts are 64 unsigned
bits stored as signed (``salt_to_db``).
"""

from __future__ import annotations

from collections.abc import Iterable

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, BYTEA, INT8MULTIRANGE, JSONB, TIMESTAMP, UUID

from segsvc.domain.operation import OperationState

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}

catalog = sa.MetaData(naming_convention=NAMING)
shard = sa.MetaData(naming_convention=NAMING)

_TIME = TIMESTAMP(timezone=True)

IN_FLIGHT = [state.name for state in OperationState if state.in_flight]
"""Operations in these states are in flight."""
_NOT_FINAL = [state.name for state in OperationState if not state.final]


def _state_in(states: Iterable[str]) -> str:
    """A condition on an operation's state, as constraints and indexes have it."""
    return f"state IN ({','.join(map(repr, states))})"


def salt_to_db(salt: int) -> int:
    """Unsigned 64 bits as PostgreSQL's signed bigint."""
    return salt - 2**64 if salt >= 2**63 else salt


def salt_from_db(value: int) -> int:
    return value % 2**64


# -- catalog --------------------------------------------------------------------------------------------------------

installation = sa.Table(
    "installation",
    catalog,
    sa.Column("cluster", sa.Text, primary_key=True, comment="name in every gid"),
    sa.Column("shard_count", sa.Integer, nullable=False, comment="in force; `segsvc shards double` doubles it"),
    sa.Column("id", UUID(as_uuid=True), nullable=False, server_default=sa.func.gen_random_uuid()),
    sa.Column("founded", _TIME, server_default=sa.func.now(), comment="null: not every shard is set up yet"),
    sa.Column("recovery_time", _TIME, comment="when recovery last looked at everything, give or take 5 s"),
    sa.Column("switch_time", _TIME, comment="since then shards are doubled, and no operation starts; null: no"),
)

segment_id_seq = sa.Sequence("segment_id_seq", metadata=catalog)
"""Numeric ids of segments; drawn at acceptance, never reused, gaps are fine."""

commit_seq = sa.Sequence("commit_seq", metadata=catalog)
"""Order of commits and edits; drawn in the transaction that decides them. Orders ``segment-events``."""

segments = sa.Table(
    "segments",
    catalog,
    sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("slug", sa.Text, nullable=False),
    sa.Column("uid", UUID(as_uuid=True), nullable=False, unique=True),
    sa.Column("salt", sa.BigInteger, nullable=False),
    sa.Column("display_name", sa.Text, nullable=False),
    sa.Column("description", sa.Text, nullable=False),
    sa.Column("labels", JSONB, nullable=False),
    sa.Column("rule_threshold", sa.Integer, comment="null: never rolled out"),
    sa.Column("rule_condition", sa.Text),
    sa.Column("rule_policy", sa.SmallInteger),
    sa.Column("rule_cost", JSONB(none_as_null=True), comment="of its condition; null: it has none, or is not measured"),
    sa.Column("state", sa.SmallInteger, nullable=False, comment="0 reserved, 1 active, 2 deleting"),
    sa.Column("etag", sa.Text, nullable=False),
    sa.Column("create_time", _TIME, nullable=False),
    sa.Column("update_time", _TIME, nullable=False),
    sa.Column("member_count", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("member_count_time", _TIME),
    sa.Column("last_operation", UUID(as_uuid=True)),
    # A row exists while its slug is taken (reserved, live, or being deleted), so plain uniqueness is "among the live".
    sa.UniqueConstraint("slug"),
    sa.Index("ix_segments_labels", "labels", postgresql_using="gin"),
)

operations = sa.Table(
    "operations",
    catalog,
    sa.Column("id", UUID(as_uuid=True), primary_key=True),
    sa.Column("seq", sa.BigInteger, sa.Identity(always=True), nullable=False, unique=True),
    sa.Column("kind", sa.SmallInteger, nullable=False),
    sa.Column("slug", sa.Text, nullable=False),
    sa.Column("segment_id", sa.BigInteger, nullable=False),
    sa.Column("plan", JSONB, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("failure", JSONB),
    sa.Column("result", JSONB, comment="of a DONE one: the segment as it was then, for the Operation's response"),
    sa.Column("commit_seq", sa.BigInteger),
    sa.Column("create_time", _TIME, nullable=False, server_default=sa.func.clock_timestamp()),
    sa.Column("start_time", _TIME),
    sa.Column("deadline", _TIME),
    sa.Column("dispatch_time", _TIME, comment="last time a chord was sent; quiet since then: recovery sends another"),
    sa.Column("commit_time", _TIME),
    sa.Column("shards_committed_time", _TIME, comment="known by then; noted only if the cache cannot be told"),
    sa.Column("end_time", _TIME),
    sa.CheckConstraint(_state_in(OperationState.__members__), name="state"),
    sa.Index("ix_operations_slug", "slug", "seq"),
    # Recovery and the queue read only operations that are not final.
    # "One in flight" must be this index: a compare-and-set with NOT EXISTS lets two in, and these deadlock across
    # shards.
    sa.Index(
        "uq_operations_in_flight",
        sa.text("(true)"),
        unique=True,
        postgresql_where=sa.text(_state_in(IN_FLIGHT)),
    ),
    sa.Index("ix_operations_open", "seq", postgresql_where=sa.text(_state_in(_NOT_FINAL))),
)
votes = sa.Table(
    "votes",
    catalog,
    sa.Column("operation_id", UUID(as_uuid=True), sa.ForeignKey("operations.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("shard", sa.Integer, primary_key=True),
    sa.Column("matched", sa.BigInteger, nullable=False),
    sa.Column("added", sa.BigInteger, nullable=False),
    sa.Column("removed", sa.BigInteger, nullable=False),
    sa.Column("members", sa.BigInteger, nullable=False),
    sa.Column(
        "absent_attributes",
        ARRAY(sa.Text),
        nullable=False,
        server_default=sa.text("'{}'"),
        comment="names in the rule's condition that no user of the shard has",
    ),
    sa.Column("vote_time", _TIME, nullable=False, server_default=sa.func.clock_timestamp()),
)

progress = sa.Table(
    "progress",
    catalog,
    sa.Column("operation_id", UUID(as_uuid=True), sa.ForeignKey("operations.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("shard", sa.Integer, primary_key=True),
    sa.Column("state", sa.SmallInteger, nullable=False),
    sa.Column("blocks_done", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("blocks_total", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("added", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("removed", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("update_time", _TIME, nullable=False, server_default=sa.func.clock_timestamp()),
    prefixes=["UNLOGGED"],  # a hint for people; losing it in a crash costs nothing
)

requests = sa.Table(
    "requests",
    catalog,
    sa.Column("method", sa.Text, primary_key=True),
    sa.Column("request_id", UUID(as_uuid=True), primary_key=True),
    sa.Column("content_hash", BYTEA, nullable=False, comment="SHA-256 of the request, its request_id apart"),
    sa.Column("operation_id", UUID(as_uuid=True), sa.ForeignKey("operations.id", ondelete="CASCADE"), nullable=False),
    sa.Column("create_time", _TIME, nullable=False, server_default=sa.func.now()),
    sa.Index("ix_requests_create_time", "create_time"),
)

audit = sa.Table(
    "audit",
    catalog,
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False, comment="drawn from commit_seq"),
    sa.Column("time", _TIME, nullable=False, server_default=sa.func.clock_timestamp()),
    sa.Column("action", sa.Text, nullable=False, comment="created, edited, rolled_out, deleted"),
    sa.Column("segment_id", sa.BigInteger, nullable=False),
    sa.Column("slug", sa.Text, nullable=False),
    sa.Column("operation_id", UUID(as_uuid=True)),
    sa.Column(
        "actor",
        sa.Text,
        nullable=False,
        server_default=sa.text("''"),
        comment="name of the principal; empty: nobody had a name",
    ),
    sa.Column("details", JSONB, nullable=False),
    sa.Column("published", sa.Boolean, nullable=False, server_default=sa.false(), comment="is on segment-events"),
    sa.Index("ix_audit_unpublished", "seq", postgresql_where=sa.text("NOT published")),
)

event_partitions = sa.Table(
    "event_partitions",
    catalog,
    # The same as the consumer group's own offsets, until Kafka forgets those.
    sa.Column("topic", sa.Text, primary_key=True),
    sa.Column("partition", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("topic_id", sa.Text, nullable=False, comment="empty: the brokers have none"),
    sa.Column("next_offset", sa.BigInteger, nullable=False, comment="committed by the bridge, some seconds ago"),
    sa.Column("update_time", _TIME, nullable=False, server_default=sa.func.clock_timestamp()),
)

event_losses = sa.Table(
    "event_losses",
    catalog,
    sa.Column("id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
    sa.Column("topic", sa.Text, nullable=False),
    sa.Column("partition", sa.Integer, nullable=False),
    sa.Column("first_offset", sa.BigInteger, nullable=False),
    sa.Column("end_offset", sa.BigInteger, comment="behind the last one that is lost; null: nobody knows"),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("find_time", _TIME, nullable=False, server_default=sa.func.clock_timestamp()),
    sa.Column("acknowledge_time", _TIME, comment="null: doctor still tells of it"),
    # A bridge that finds a gap again, after a crash for example, adds no second row.
    sa.Index(
        "uq_event_losses_open",
        "topic",
        "partition",
        "first_offset",
        unique=True,
        postgresql_where=sa.text("acknowledge_time IS NULL"),
    ),
)

bridge_waits = sa.Table(
    "bridge_waits",
    catalog,
    sa.Column("bridge", UUID(as_uuid=True), primary_key=True, comment="drawn by each process"),
    sa.Column("what", sa.Text, primary_key=True),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("update_time", _TIME, nullable=False, server_default=sa.func.clock_timestamp()),
)

dead_letters_done = sa.Table(
    "dead_letters_done",
    catalog,
    sa.Column("topic", sa.Text, primary_key=True, comment="of the letters"),
    sa.Column("topic_id", sa.Text, primary_key=True, comment="a topic that is made again has other letters"),
    sa.Column("partition", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("offsets", INT8MULTIRANGE, nullable=False, comment="of letters that were sent again or dismissed"),
)

# -- shard ----------------------------------------------------------------------------------------------------------

shard_state = sa.Table(
    "shard_state",
    shard,
    # One row. Event batches lock it first (FOR UPDATE). So slots are given out densely, and the writers of directory,
    # bits and counters run one after the other and need no lock order of their own.
    sa.Column("one", sa.Boolean, primary_key=True, server_default=sa.true()),
    sa.Column("cluster", sa.Text, nullable=False),
    sa.Column("installation", UUID(as_uuid=True), nullable=False, comment="id of the catalog's installation"),
    sa.Column("shard", sa.Integer, nullable=False),
    sa.Column("shard_count", sa.Integer, nullable=False),
    sa.Column("next_slot", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("user_count", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("retired_time", _TIME, comment="the shard goes on in another database; never to be used again"),
    sa.CheckConstraint("one", name="one"),
)

users = sa.Table(
    "users",
    shard,
    sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("slot", sa.BigInteger, nullable=False, unique=True, comment="dense, by arrival, never reused"),
    sa.Column("attributes", JSONB, nullable=False),
    sa.Column("version", sa.BigInteger, nullable=False, comment="of the newest event applied"),
    sa.Column("row_version", sa.BigInteger, nullable=False, server_default="0", comment="raised by every change"),
    sa.Column("create_time", _TIME, nullable=False, server_default=sa.func.now()),
    sa.Column("update_time", _TIME, nullable=False, server_default=sa.func.now()),
)

directory = sa.Table(
    "directory",
    shard,
    sa.Column("block", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("user_ids", BYTEA, nullable=False, comment="1024 little-endian int64; 0: no user"),
)
# Ids hardly compress, and every creation rewrites its block: PostgreSQL shall not try to compress each time.
_EXTERNAL = sa.DDL("ALTER TABLE directory ALTER COLUMN user_ids SET STORAGE EXTERNAL")  # type: ignore[no-untyped-call]
sa.event.listen(directory, "after_create", _EXTERNAL)

memberships = sa.Table(
    "memberships",
    shard,
    sa.Column("block", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("segment_id", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("bits", BYTEA, nullable=False, comment="1024 bits, lowest first; a row of zeros is not kept"),
    sa.Index("ix_memberships_segment_id_block", "segment_id", "block"),
)

shard_segments = sa.Table(
    "segments",
    shard,
    sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("slug", sa.Text, nullable=False),
    sa.Column("salt", sa.BigInteger, nullable=False),
    sa.Column("rule_threshold", sa.Integer, comment="null: never rolled out"),
    sa.Column("rule_condition", sa.Text),
    sa.Column("rule_policy", sa.SmallInteger),
    sa.Column("frozen_slot", sa.BigInteger, comment="of a FROZEN rule: highest slot at the rollout, -1: none"),
    sa.Column("rule_count", sa.BigInteger, nullable=False, server_default="0", comment="bits set, overrides apart"),
)

overrides = sa.Table(
    "overrides",
    shard,
    sa.Column("user_id", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("segment_id", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("effect", sa.SmallInteger, nullable=False, comment="1 include, 2 exclude"),
    sa.Column("expire_time", _TIME, comment="null: holds for ever"),
    sa.Column("create_time", _TIME, nullable=False, server_default=sa.func.now()),
    sa.Column(
        "creator",
        sa.Text,
        nullable=False,
        server_default=sa.text("''"),
        comment="name of the principal; empty: nobody had a name",
    ),
    sa.Index("ix_overrides_segment_id", "segment_id"),
    sa.Index("ix_overrides_expire_time", "expire_time", postgresql_where=sa.text("expire_time IS NOT NULL")),
)

user_requests = sa.Table(
    "user_requests",
    shard,
    # On the user's shard, because the answer is written in the transaction whose result it is.
    sa.Column("user_id", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("request_id", UUID(as_uuid=True), primary_key=True),
    sa.Column("content_hash", BYTEA, nullable=False, comment="SHA-256 of the request, its request_id apart"),
    sa.Column("answer", JSONB, nullable=False),
    sa.Column("create_time", _TIME, nullable=False, server_default=sa.func.now()),
    sa.Index("ix_user_requests_create_time", "create_time"),
)

deleted_users = sa.Table(
    "deleted_users",
    shard,
    sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("delete_time", _TIME, nullable=False, server_default=sa.func.now()),
    sa.Index("ix_deleted_users_delete_time", "delete_time"),
)

applied_operations = sa.Table(
    "applied_operations",
    shard,
    # The fence: an operation's work on this shard is committed iff its row is visible.
    sa.Column("operation_id", UUID(as_uuid=True), primary_key=True),
    sa.Column("kind", sa.SmallInteger, nullable=False),
    sa.Column("apply_time", _TIME, nullable=False, server_default=sa.func.clock_timestamp()),
    sa.Column("epoch", sa.BigInteger, unique=True, comment="that it began; null: a creation, or older than epochs"),
)

shard_epoch = sa.Table(
    "shard_epoch",
    shard,
    # At most one row; none: epoch 0. Only operations write it. It is no column of shard_state, because every creation
    # writes that row, and each read of a user would have to step over its dead versions.
    sa.Column("one", sa.Boolean, primary_key=True, server_default=sa.true()),
    sa.Column("epoch", sa.BigInteger, nullable=False, comment="committed operations that may have changed lists"),
    sa.CheckConstraint("one", name="one"),
)

changed_slots = sa.Table(
    "changed_slots",
    shard,
    # One row for each transaction that changed or deleted users. The key needs no sequence, so a copy of the shard goes
    # on where the shard was.
    sa.Column("epoch", sa.BigInteger, primary_key=True, autoincrement=False, comment="the shard's at that time"),
    sa.Column("xid", sa.BigInteger, primary_key=True, autoincrement=False, comment="of the transaction"),
    sa.Column("slots", BYTEA, nullable=False, comment="big-endian int32 each; a slot may occur twice"),
    sa.Column("note_time", _TIME, nullable=False, server_default=sa.func.clock_timestamp()),
)
# The database itself notes who changed. So no statement can forget it, not even one of an older release whose processes
# still run while the installation is upgraded.
_NOTING = (
    """
CREATE OR REPLACE FUNCTION note_changed_slots() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO changed_slots (epoch, xid, slots)
    SELECT coalesce((SELECT epoch FROM shard_epoch), 0), CAST(CAST(pg_current_xact_id() AS text) AS bigint),
           string_agg(int4send(CAST(changed.slot AS int4)), CAST('' AS bytea))
    FROM changed HAVING count(*) > 0
    ON CONFLICT (epoch, xid)
    DO UPDATE SET slots = changed_slots.slots || excluded.slots, note_time = excluded.note_time;
    RETURN NULL;
END $$
""",
    """
CREATE TRIGGER note_updated AFTER UPDATE ON users
REFERENCING NEW TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION note_changed_slots()
""",
    """
CREATE TRIGGER note_deleted AFTER DELETE ON users
REFERENCING OLD TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION note_changed_slots()
""",
)
for _statement in _NOTING:
    sa.event.listen(shard, "after_create", sa.DDL(_statement))  # type: ignore[no-untyped-call]
