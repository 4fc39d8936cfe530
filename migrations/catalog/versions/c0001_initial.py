"""initial."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "c0001"
down_revision = None


def upgrade() -> None:
    op.execute("CREATE SEQUENCE segment_id_seq")
    op.execute("CREATE SEQUENCE commit_seq")
    op.create_table(
        "audit",
        sa.Column("seq", sa.BigInteger(), autoincrement=False, nullable=False, comment="drawn from commit_seq"),
        sa.Column(
            "time", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("action", sa.Text(), nullable=False, comment="created, edited, rolled_out, deleted"),
        sa.Column("segment_id", sa.BigInteger(), nullable=False),
        sa.Column("slug", sa.Text(), nullable=False),
        sa.Column("operation_id", sa.UUID(), nullable=True),
        sa.Column("details", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column(
            "published", sa.Boolean(), server_default=sa.text("false"), nullable=False, comment="is on segment-events"
        ),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_audit")),
    )
    op.create_index("ix_audit_unpublished", "audit", ["seq"], unique=False, postgresql_where=sa.text("NOT published"))
    op.create_table(
        "installation",
        sa.Column("cluster", sa.Text(), nullable=False, comment="name in every gid"),
        sa.Column("shard_count", sa.Integer(), nullable=False, comment="fixed for ever"),
        sa.Column("id", sa.UUID(), server_default=sa.text("gen_random_uuid()"), nullable=False),
        sa.Column(
            "founded",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("now()"),
            nullable=True,
            comment="null: not every shard is set up yet",
        ),
        sa.Column(
            "recovery_time",
            postgresql.TIMESTAMP(timezone=True),
            nullable=True,
            comment="when recovery last looked at everything, give or take 5 s",
        ),
        sa.PrimaryKeyConstraint("cluster", name=op.f("pk_installation")),
    )
    op.create_table(
        "operations",
        sa.Column("id", sa.UUID(), nullable=False),
        sa.Column("seq", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("kind", sa.SmallInteger(), nullable=False),
        sa.Column("slug", sa.Text(), nullable=False),
        sa.Column("segment_id", sa.BigInteger(), nullable=False),
        sa.Column("plan", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("failure", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column(
            "result",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=True,
            comment="of a DONE one: the segment as it was then, for the Operation's response",
        ),
        sa.Column("commit_seq", sa.BigInteger(), nullable=True),
        sa.Column(
            "create_time",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column("start_time", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("deadline", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column(
            "dispatch_time",
            postgresql.TIMESTAMP(timezone=True),
            nullable=True,
            comment="last time a chord was sent; quiet since then: recovery sends another",
        ),
        sa.Column("commit_time", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column(
            "shards_committed_time",
            postgresql.TIMESTAMP(timezone=True),
            nullable=True,
            comment="known by then; noted only if the cache cannot be told",
        ),
        sa.Column("end_time", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.CheckConstraint(
            "state IN ('QUEUED','PREPARING','COMMITTED','DONE','ABORTED')", name=op.f("ck_operations_state")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_operations")),
        sa.UniqueConstraint("seq", name=op.f("uq_operations_seq")),
    )
    op.create_index(
        "ix_operations_open",
        "operations",
        ["seq"],
        unique=False,
        postgresql_where=sa.text("state IN ('QUEUED','PREPARING','COMMITTED')"),
    )
    op.create_index("ix_operations_slug", "operations", ["slug", "seq"], unique=False)
    op.create_index(
        "uq_operations_in_flight",
        "operations",
        [sa.literal_column("(true)")],
        unique=True,
        postgresql_where=sa.text("state IN ('PREPARING','COMMITTED')"),
    )
    op.create_table(
        "segments",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("slug", sa.Text(), nullable=False),
        sa.Column("uid", sa.UUID(), nullable=False),
        sa.Column("salt", sa.BigInteger(), nullable=False),
        sa.Column("display_name", sa.Text(), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("labels", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("rule_threshold", sa.Integer(), nullable=True, comment="null: never rolled out"),
        sa.Column("rule_condition", sa.Text(), nullable=True),
        sa.Column("rule_policy", sa.SmallInteger(), nullable=True),
        sa.Column("state", sa.SmallInteger(), nullable=False, comment="0 reserved, 1 active, 2 deleting"),
        sa.Column("etag", sa.Text(), nullable=False),
        sa.Column("create_time", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("update_time", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("member_count", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("member_count_time", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("last_operation", sa.UUID(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_segments")),
        sa.UniqueConstraint("slug", name=op.f("uq_segments_slug")),
        sa.UniqueConstraint("uid", name=op.f("uq_segments_uid")),
    )
    op.create_index("ix_segments_labels", "segments", ["labels"], unique=False, postgresql_using="gin")
    op.create_table(
        "progress",
        sa.Column("operation_id", sa.UUID(), nullable=False),
        sa.Column("shard", sa.Integer(), nullable=False),
        sa.Column("state", sa.SmallInteger(), nullable=False),
        sa.Column("blocks_done", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("blocks_total", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("added", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("removed", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column(
            "update_time",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.ForeignKeyConstraint(
            ["operation_id"], ["operations.id"], name=op.f("fk_progress_operation_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("operation_id", "shard", name=op.f("pk_progress")),
        prefixes=["UNLOGGED"],
    )
    op.create_table(
        "requests",
        sa.Column("method", sa.Text(), nullable=False),
        sa.Column("request_id", sa.UUID(), nullable=False),
        sa.Column(
            "content_hash", postgresql.BYTEA(), nullable=False, comment="SHA-256 of the request, its request_id apart"
        ),
        sa.Column("operation_id", sa.UUID(), nullable=False),
        sa.Column("create_time", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["operation_id"], ["operations.id"], name=op.f("fk_requests_operation_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("method", "request_id", name=op.f("pk_requests")),
    )
    op.create_index("ix_requests_create_time", "requests", ["create_time"], unique=False)
    op.create_table(
        "votes",
        sa.Column("operation_id", sa.UUID(), nullable=False),
        sa.Column("shard", sa.Integer(), nullable=False),
        sa.Column("matched", sa.BigInteger(), nullable=False),
        sa.Column("added", sa.BigInteger(), nullable=False),
        sa.Column("removed", sa.BigInteger(), nullable=False),
        sa.Column("members", sa.BigInteger(), nullable=False),
        sa.Column(
            "vote_time",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.ForeignKeyConstraint(
            ["operation_id"], ["operations.id"], name=op.f("fk_votes_operation_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("operation_id", "shard", name=op.f("pk_votes")),
    )
