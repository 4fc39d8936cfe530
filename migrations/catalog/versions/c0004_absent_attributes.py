"""What a vote says of the attributes that a rule's condition reads."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "c0004"
down_revision = "c0003"


def upgrade() -> None:
    op.add_column(
        "votes",
        sa.Column(
            "absent_attributes",
            postgresql.ARRAY(sa.Text()),
            server_default=sa.text("'{}'"),
            nullable=False,
            comment="names in the rule's condition that no user of the shard has",
        ),
    )
