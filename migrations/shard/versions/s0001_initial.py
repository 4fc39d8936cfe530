"""initial."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "s0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "applied_operations",
        sa.Column("operation_id", sa.UUID(), nullable=False),
        sa.Column("kind", sa.SmallInteger(), nullable=False),
        sa.Column(
            "apply_time",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("operation_id", name=op.f("pk_applied_operations")),
    )
    op.create_table(
        "deleted_users",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("delete_time", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_deleted_users")),
    )
    op.create_index("ix_deleted_users_delete_time", "deleted_users", ["delete_time"], unique=False)
    op.create_table(
        "directory",
        sa.Column("block", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("user_ids", postgresql.BYTEA(), nullable=False, comment="1024 little-endian int64; 0: no user"),
        sa.PrimaryKeyConstraint("block", name=op.f("pk_directory")),
    )
    # Ids hardly compress, and every creation rewrites its block: do not try each time.
    op.execute("ALTER TABLE directory ALTER COLUMN user_ids SET STORAGE EXTERNAL")
    op.create_table(
        "memberships",
        sa.Column("block", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("segment_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column(
            "bits", postgresql.BYTEA(), nullable=False, comment="1024 bits, lowest first; a row of zeros is not kept"
        ),
        sa.PrimaryKeyConstraint("block", "segment_id", name=op.f("pk_memberships")),
    )
    op.create_index("ix_memberships_segment_id_block", "memberships", ["segment_id", "block"], unique=False)
    op.create_table(
        "overrides",
        sa.Column("user_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("segment_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("effect", sa.SmallInteger(), nullable=False, comment="1 include, 2 exclude"),
        sa.Column("expire_time", postgresql.TIMESTAMP(timezone=True), nullable=True, comment="null: holds for ever"),
        sa.Column("create_time", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("user_id", "segment_id", name=op.f("pk_overrides")),
    )
    op.create_index(
        "ix_overrides_expire_time",
        "overrides",
        ["expire_time"],
        unique=False,
        postgresql_where=sa.text("expire_time IS NOT NULL"),
    )
    op.create_index("ix_overrides_segment_id", "overrides", ["segment_id"], unique=False)
    op.create_table(
        "segments",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("slug", sa.Text(), nullable=False),
        sa.Column("salt", sa.BigInteger(), nullable=False),
        sa.Column("rule_threshold", sa.Integer(), nullable=True, comment="null: never rolled out"),
        sa.Column("rule_condition", sa.Text(), nullable=True),
        sa.Column("rule_policy", sa.SmallInteger(), nullable=True),
        sa.Column(
            "frozen_slot",
            sa.BigInteger(),
            nullable=True,
            comment="of a FROZEN rule: highest slot at the rollout, -1: none",
        ),
        sa.Column(
            "rule_count", sa.BigInteger(), server_default="0", nullable=False, comment="bits set, overrides apart"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_segments")),
    )
    op.create_table(
        "shard_state",
        sa.Column("one", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("cluster", sa.Text(), nullable=False),
        sa.Column("installation", sa.UUID(), nullable=False, comment="id of the catalog's installation"),
        sa.Column("shard", sa.Integer(), nullable=False),
        sa.Column("shard_count", sa.Integer(), nullable=False),
        sa.Column("next_slot", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("user_count", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column(
            "retired_time",
            postgresql.TIMESTAMP(timezone=True),
            nullable=True,
            comment="the shard goes on in another database; never to be used again",
        ),
        sa.CheckConstraint("one", name=op.f("ck_shard_state_one")),
        sa.PrimaryKeyConstraint("one", name=op.f("pk_shard_state")),
    )
    op.create_table(
        "user_requests",
        sa.Column("user_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("request_id", sa.UUID(), nullable=False),
        sa.Column(
            "content_hash",
            postgresql.BYTEA(),
            nullable=False,
            comment="SHA-256 of the request, its request_id apart",
        ),
        sa.Column("answer", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("create_time", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("user_id", "request_id", name=op.f("pk_user_requests")),
    )
    op.create_index("ix_user_requests_create_time", "user_requests", ["create_time"], unique=False)
    op.create_table(
        "users",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("slot", sa.BigInteger(), nullable=False, comment="dense, by arrival, never reused"),
        sa.Column("attributes", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False, comment="of the newest event applied"),
        sa.Column("row_version", sa.BigInteger(), server_default="0", nullable=False, comment="raised by every change"),
        sa.Column("create_time", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("update_time", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_users")),
        sa.UniqueConstraint("slot", name=op.f("uq_users_slot")),
    )
