"""Who has set an override."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "s0003"
down_revision = "s0002"


def upgrade() -> None:
    op.add_column(
        "overrides",
        sa.Column(
            "creator",
            sa.Text(),
            server_default=sa.text("''"),
            nullable=False,
            comment="name of the principal; empty: nobody had a name",
        ),
    )
