"""What a rule's condition costs a user. Null for rules that were accepted before: upkeep measures them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "c0002"
down_revision = "c0001"


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
