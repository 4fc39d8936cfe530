"""Write the next migration: ``python -m migrations.new catalog|shard "what changes"``.

Brings a scratch database of a throw-away server to the newest migration, compares it with the declared tables and
writes the difference. Read what it wrote, and make it safe on big tables, before you commit it. There is no way down:
a mistake is mended by the next migration.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.script import Script, ScriptDirectory

from segsvc.local.postgres import PostgresServer
from segsvc.postgres.installation.identity import Kind
from segsvc.postgres.installation.migrate import alembic_config


def write(kind: Kind, message: str) -> Path:
    """Write a migration of this kind into the checkout; an empty one if nothing differs."""
    server = PostgresServer(Path(tempfile.mkdtemp(prefix="segsvc-migration-")), fast=True)
    try:
        server.start()
        engine = sa.create_engine(server.dsn("postgres"))
        with engine.connect() as connection:
            config = alembic_config(kind, connection)
            command.upgrade(config, "head")
            number = sum(1 for _ in ScriptDirectory.from_config(config).walk_revisions()) + 1
            script = command.revision(config, message, autogenerate=True, rev_id=f"{kind[0]}{number:04d}")
        engine.dispose()
    finally:
        server.purge()
    assert isinstance(script, Script)
    return tidy(Path(script.path))


def tidy(path: Path) -> Path:
    """Format what Alembic wrote, without its own remarks."""
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.lstrip().startswith("# ###")))
    for action in (["format"], ["check", "--fix", "--exit-zero"]):
        subprocess.run([sys.executable, "-m", "ruff", *action, "--quiet", str(path)], check=True)
    return path


def main() -> None:
    """The command line of this module."""
    if len(sys.argv) != 3 or sys.argv[1] not in ("catalog", "shard"):
        sys.exit('usage: python -m migrations.new catalog|shard "what changes"')
    print(write("catalog" if sys.argv[1] == "catalog" else "shard", sys.argv[2]))


if __name__ == "__main__":
    main()
