"""Who has changed a segment."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "c0006"
down_revision = "c0005"


def upgrade() -> None:
    op.add_column(
        "audit",
        sa.Column(
            "actor",
            sa.Text(),
            server_default=sa.text("''"),
            nullable=False,
            comment="name of the principal; empty: nobody had a name",
        ),
    )
