"""What is remembered of Kafka's topics."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "c0002"
down_revision = "c0001"


def upgrade() -> None:
    op.create_table(
        "bridge_waits",
        sa.Column("bridge", sa.UUID(), nullable=False, comment="drawn by each process"),
        sa.Column("what", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column(
            "update_time",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("bridge", "what", name=op.f("pk_bridge_waits")),
    )
    op.create_table(
        "dead_letters_done",
        sa.Column("topic", sa.Text(), nullable=False, comment="of the letters"),
        sa.Column("topic_id", sa.Text(), nullable=False, comment="a topic that is made again has other letters"),
        sa.Column("partition", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column(
            "offsets",
            postgresql.INT8MULTIRANGE(),
            nullable=False,
            comment="of letters that were sent again or dismissed",
        ),
        sa.PrimaryKeyConstraint("topic", "topic_id", "partition", name=op.f("pk_dead_letters_done")),
    )
    op.create_table(
        "event_losses",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("topic", sa.Text(), nullable=False),
        sa.Column("partition", sa.Integer(), nullable=False),
        sa.Column("first_offset", sa.BigInteger(), nullable=False),
        sa.Column(
            "end_offset", sa.BigInteger(), nullable=True, comment="behind the last one that is lost; null: nobody knows"
        ),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column(
            "find_time",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column(
            "acknowledge_time",
            postgresql.TIMESTAMP(timezone=True),
            nullable=True,
            comment="null: doctor still tells of it",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_event_losses")),
    )
    op.create_index(
        "uq_event_losses_open",
        "event_losses",
        ["topic", "partition", "first_offset"],
        unique=True,
        postgresql_where=sa.text("acknowledge_time IS NULL"),
    )
    op.create_table(
        "event_partitions",
        sa.Column("topic", sa.Text(), nullable=False),
        sa.Column("partition", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("topic_id", sa.Text(), nullable=False, comment="empty: the brokers have none"),
        sa.Column("next_offset", sa.BigInteger(), nullable=False, comment="committed by the bridge, some seconds ago"),
        sa.Column(
            "update_time",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("topic", "partition", name=op.f("pk_event_partitions")),
    )
