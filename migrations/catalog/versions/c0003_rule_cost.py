"""What a rule's condition costs a user. Null for rules that were accepted before: upkeep measures them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "c0003"
down_revision = "c0002"


def upgrade() -> None:
    op.add_column(
        "segments",
        sa.Column(
            "rule_cost",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=True,
            comment="of its condition; null: it has none, or is not measured",
        ),
    )
