"""What both Alembic environments share."""

from __future__ import annotations

from collections.abc import Iterable

import sqlalchemy as sa
from alembic import context
from alembic.migration import MigrationContext
from alembic.operations.ops import ExecuteSQLOp, MigrationScript


def run(metadata: sa.MetaData) -> None:
    """Run or generate migrations on the connection that the caller put into ``config.attributes``.

    The caller owns the transaction, so that a database gets all of its migrations and its identity, or nothing.

    Raises:
        RuntimeError: Alembic was started from its own command line.
    """
    connection = context.config.attributes.get("connection")
    if connection is None:
        raise RuntimeError("use `segsvc migrate` to run migrations and `python -m migrations.new` to write one")
    context.configure(
        connection=connection,
        target_metadata=metadata,
        compare_type=True,
        compare_server_default=True,
        process_revision_directives=_add_sequences,
    )
    context.run_migrations()


def _add_sequences(
    context: MigrationContext, _revision: str | Iterable[str | None] | Iterable[str], scripts: list[MigrationScript]
) -> None:
    """Alembic's autogenerate does not look at sequences: create the declared ones that are not there."""
    connection, metadata = context.connection, context.opts["target_metadata"]
    if connection is None or scripts[0].upgrade_ops is None:
        raise RuntimeError("autogenerate compares with a database")
    existing = set(sa.inspect(connection).get_sequence_names())
    # There is no public way to list them. Those of identity columns belong to their table and are not among them.
    declared: dict[str, sa.Sequence] = metadata._sequences  # noqa: SLF001
    for name in sorted(set(declared) - existing):
        scripts[0].upgrade_ops.ops.insert(0, ExecuteSQLOp(f"CREATE SEQUENCE {name}"))
