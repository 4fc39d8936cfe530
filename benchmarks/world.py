"""Servers for the benchmarks, and installations with many users, created in seconds.

A world offers two kinds of environment: bare servers (PostgreSQL with fsync, a cache), on which a benchmark itself runs
parts of the service; and the whole stack as ``make up`` starts it. All files are in ``build/bench``, and all processes
carry a mark: the next run removes the remains of a run that was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import redis
import sqlalchemy as sa

from benchmarks import rows
from benchmarks.seed import Shape, fill
from segsvc.cli.front import is_serving
from segsvc.config import Settings
from segsvc.local.postgres import PostgresServer
from segsvc.local.processes import Daemon, LocalStackError, find_marked, kill_marked, termination_raises
from segsvc.local.redis import CACHE_CONFIG, RedisServer
from segsvc.local.stack import LocalStack
from segsvc.local.stack_env import write_env
from segsvc.postgres.installation.migrate import head, migrate
from tests.installation import Installation

FOLDER = Path("build/bench")
READY_TIMEOUT_S = 30.0
_TEMPLATE = "seeded_{kind}_{database}"
_WORKING = "bench_{database}"

Say = Callable[[str], object]


def _say(text: str) -> None:
    print(f"  … {text}", file=sys.stderr, flush=True)


class World:
    """The environment of benchmarks. Servers start at first use and stop at the end of the block; their data stays.

    Args:
        folder: folder of all files.
        say: called with a sentence for each step.
    """

    def __init__(self, folder: Path = FOLDER, say: Say = _say) -> None:
        self.folder = folder.resolve()
        self.say = say
        self._servers = self.folder / "servers"
        self._stack_home = self.folder / "stack"
        self._postgres: PostgresServer | None = None
        self._cache: RedisServer | None = None
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            undo.enter_context(termination_raises())
            self.folder.mkdir(parents=True, exist_ok=True)
            undo.enter_context(self._alone())
            self._clean_up()
            undo.callback(self._clean_up)
            self._exit = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Refuse a second run in this folder, because each would end the other's processes.

        Raises:
            LocalStackError: another run uses the folder.
        """
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LocalStackError(f"other benchmarks run in {self.folder}") from None
            yield

    # -- servers ----------------------------------------------------------------------------------------------------

    @property
    def postgres(self) -> PostgresServer:
        """PostgreSQL, durable as in production (fsync, full pages)."""
        if self._postgres is None:
            self.say("starting PostgreSQL")
            self._postgres = PostgresServer(self._servers / "postgres", mark=self._servers)
            self._postgres.start()
            self._exit.callback(self._postgres.stop)
        return self._postgres

    @property
    def cache(self) -> RedisServer:
        """The cache's server, configured as in production. Call ``empty_cache`` if a benchmark needs it empty."""
        if self._cache is None:
            self.say("starting the cache")
            self._cache = RedisServer("cache", self._servers / "cache", CACHE_CONFIG, mark=self._servers)
            self._cache.start()
            self._exit.callback(self._cache.stop)
        return self._cache

    def empty_cache(self) -> None:
        """Delete everything from the bare cache."""
        with redis.Redis.from_url(self.cache.url) as client:
            client.flushall()

    @property
    def mark(self) -> Path:
        """Pass this to processes that a benchmark starts (``Daemon(…, mark=world.mark)``): leftover ones are killed."""
        return self._servers

    @contextlib.contextmanager
    def process(
        self,
        name: str,
        *argv: str,
        ready: Callable[[], bool],
        settings: Settings | None = None,
    ) -> Iterator[int]:
        """A Python process beside the servers: ``world.process("front", "-m", "segsvc", "serve", ready=…)``. Yields
        its pid.

        SIGTERM stops the process. Its output is in ``build/bench/servers/<name>/<name>.log``.

        Args:
            argv: arguments of this interpreter.
            ready: polled until it returns True.
            settings: the settings that the process reads; None: none.

        Raises:
            LocalStackError: the process ended or did not become ready; the text has the last lines of its log.
        """
        folder = self._servers / name
        daemon = Daemon(name, folder, log=folder / f"{name}.log", mark=self._servers)

        env = {"PYTHONPATH": str(Path.cwd())}
        if settings is not None:
            folder.mkdir(parents=True, exist_ok=True)
            write_env(folder / "settings.env", settings)
            env["SEGSVC_ENV_FILE"] = str(folder / "settings.env")

        daemon.spawn([sys.executable, *argv], env=env)
        try:
            daemon.await_ready(ready, timeout_s=READY_TIMEOUT_S)
            pid = daemon.pid
            assert pid is not None
            yield pid
        finally:
            daemon.stop(signals=((signal.SIGTERM, 15.0), (signal.SIGKILL, 5.0)))

    # -- installations ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def installation(self, shape: Shape, **settings: Any) -> Iterator[Installation]:
        """A new installation of this shape on the bare servers, as a copy of a template. The template is made at first
        use. The cache is empty. Only one installation can exist at a time.

        Args:
            settings: settings by field name.
        """
        names = ["catalog", *(f"shard{shard}" for shard in range(shape.shards))]
        # The migrations' heads are part of the name, so a change of the tables makes a new template.
        kind = f"{shape.digest}_{head('catalog')}_{head('shard')}"
        templates = [_TEMPLATE.format(kind=kind, database=name) for name in names]
        working = [_WORKING.format(database=name) for name in names]

        self._make_templates(shape, templates)
        self.say(f"copying an installation of {shape}")
        for template, name in zip(templates, working, strict=True):
            self._drop(name)
            # Copy the files: the other strategy would write each page into the WAL.
            self._sql(f'CREATE DATABASE "{name}" TEMPLATE "{template}" STRATEGY FILE_COPY')
        # Its entries are of the installation before, which had the same users and other segments.
        self.empty_cache()

        try:
            yield self._installation(working, cache_url=self.cache.url, **settings)
        finally:
            for name in working:
                self._drop(name)

    def _installation(self, names: list[str], **settings: Any) -> Installation:
        dsns = [self.postgres.dsn(name) for name in names]
        return Installation(
            Settings(_env_file=None, catalog_dsn=dsns[0], shard_dsns=tuple(dsns[1:]), **settings), self.postgres
        )

    def _make_templates(self, shape: Shape, names: list[str]) -> None:
        """Make the template databases, unless all are complete. A complete one is marked as a template."""
        found = self.postgres.psql("SELECT datname FROM pg_database WHERE datistemplate").split()
        if set(names) <= set(found):
            return

        for name in names:
            self._drop(name)

        self.say(f"making an installation of {shape}")
        for name in names:
            self.postgres.create_database(name)
        settings = self._installation(names).settings
        migrate(settings)
        self._fill(settings, shape)

        for name in names:
            # End all sessions: a template with sessions cannot be copied.
            self.postgres.psql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :'name'", name=name
            )
            self._sql(f'ALTER DATABASE "{name}" IS_TEMPLATE true')

    def _fill(self, settings: Settings, shape: Shape) -> None:
        fill(settings, shape)
        for shard, dsn in enumerate(settings.shard_dsns):
            engine = sa.create_engine(dsn)
            if shape.rows:
                self.say(f"loading the rows of shard {shard}")
                rows.load(engine, shape)
            # Autovacuum would do this sooner or later: statistics, and pages marked as visible to all.
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.exec_driver_sql("VACUUM (ANALYZE)")
            engine.dispose()

    def _drop(self, name: str) -> None:
        if self.postgres.psql("SELECT 1 FROM pg_database WHERE datname = :'name'", name=name).strip():
            self._sql(f'ALTER DATABASE "{name}" IS_TEMPLATE false')
            self._sql(f'DROP DATABASE "{name}" WITH (FORCE)')

    def _sql(self, statement: str) -> None:
        self.postgres.psql(statement)

    # -- the whole stack --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def stack(self, shape: Shape | None = None, *, shards: int = 4, **settings: Any) -> Iterator[LocalStack]:
        """The whole stack, new, empty or with an installation of this shape. It is deleted afterwards.

        Args:
            shape: the content, which also sets the number of shards; None: empty, with ``shards`` shards.
            settings: settings by field name.
        """
        home = self._stack_home
        # Without credentials: what they cost is measured apart (read_hit_token).
        overrides: Mapping[str, Any] = {"stack_dir": home, "auth": ("none",), **settings}
        stack = LocalStack(
            overrides,
            home=home,
            shards=shape.shards if shape else shards,
            jars=Path("build/kafka-jars").resolve(),
            say=self.say,
            ready=is_serving,
        )

        stack.down(purge=True)
        try:
            with stack:
                if shape:
                    self.say(f"filling it with {shape}")
                    self._fill(stack.settings, shape)
                yield stack
        finally:
            stack.down(purge=True)

    def _clean_up(self) -> None:
        """End all processes with this world's marks, and remove the stack's folder. The bare servers' data stays."""
        for folder in (self._servers, self._stack_home):
            if find_marked(folder):
                self.say(f"ending what is left of {folder}: {', '.join(kill_marked(folder))}")
        if self._stack_home.exists():
            LocalStack(home=self._stack_home, say=self.say).down(purge=True)
            shutil.rmtree(self._stack_home, ignore_errors=True)
