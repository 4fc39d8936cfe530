"""The number of shards may double; while it does, no operation starts."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "c0005"
down_revision = "c0004"


def upgrade() -> None:
    op.add_column(
        "installation",
        sa.Column(
            "switch_time",
            postgresql.TIMESTAMP(timezone=True),
            nullable=True,
            comment="since then shards are doubled, and no operation starts; null: no",
        ),
    )
    op.alter_column(
        "installation",
        "shard_count",
        existing_type=sa.Integer(),
        existing_nullable=False,
        existing_comment="fixed for ever",
        comment="in force; `segsvc shards double` doubles it",
    )
