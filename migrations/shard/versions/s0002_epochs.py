"""Epochs, and who changed in them: what patches of the cache are made of."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "s0002"
down_revision = "s0001"

# The database itself notes who changed, because processes of the release before may go on for a while.
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


def upgrade() -> None:
    op.create_table(
        "shard_epoch",
        sa.Column("one", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False, comment="committed operations that may have changed lists"),
        sa.CheckConstraint("one", name=op.f("ck_shard_epoch_one")),
        sa.PrimaryKeyConstraint("one", name=op.f("pk_shard_epoch")),
    )
    op.create_table(
        "changed_slots",
        sa.Column("epoch", sa.BigInteger(), autoincrement=False, nullable=False, comment="the shard's at that time"),
        sa.Column("xid", sa.BigInteger(), autoincrement=False, nullable=False, comment="of the transaction"),
        sa.Column("slots", postgresql.BYTEA(), nullable=False, comment="big-endian int32 each; a slot may occur twice"),
        sa.Column(
            "note_time",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("epoch", "xid", name=op.f("pk_changed_slots")),
    )
    op.add_column(
        "applied_operations",
        sa.Column(
            "epoch", sa.BigInteger(), nullable=True, comment="that it began; null: a creation, or older than epochs"
        ),
    )
    op.create_unique_constraint(op.f("uq_applied_operations_epoch"), "applied_operations", ["epoch"])
    for statement in _NOTING:
        op.execute(statement)
