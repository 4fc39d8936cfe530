"""psql on a database of the local stack: python tools/psql.py catalog, python tools/psql.py shard-0 -c 'SELECT 1'."""

from __future__ import annotations

import os
import shutil
import sys
from typing import Never

from sqlalchemy.engine import URL, make_url

from segsvc.cli.base import settings_of_process
from segsvc.config import Settings
from segsvc.local.postgres import install_folder


def database(settings: Settings, name: str) -> URL:
    """The address of ``catalog`` or ``shard-N``.

    Raises:
        SystemExit: there is no such database; the message names those that there are.
    """
    dsns = {"catalog": settings.catalog_dsn}
    dsns |= {f"shard-{shard}": dsn for shard, dsn in enumerate(settings.shard_dsns)}
    if name not in dsns:
        raise SystemExit(f"there is no database {name!r}; there are {', '.join(dsns)}")
    return make_url(dsns[name])


def main(name: str, *arguments: str) -> Never:
    url = database(settings_of_process(), name)
    psql = shutil.which("psql") or str(install_folder() / "bin" / "psql")

    # The password goes through the environment: other users of the machine can read arguments.
    environment = os.environ | ({"PGPASSWORD": str(url.password)} if url.password else {})
    address = url.set(drivername="postgresql", password=None).render_as_string()
    os.execve(psql, [psql, *arguments, address], environment)  # noqa: S606 - takes this process's place


if __name__ == "__main__":
    main(*sys.argv[1:])
