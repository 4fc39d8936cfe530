"""An installation on a PostgreSQL that takes encrypted connections with a password only (``sslmode=verify-full``).

The wheel's PostgreSQL knows no TLS, so this needs one of the distribution.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest
import sqlalchemy as sa

from segsvc.config import Settings
from segsvc.local.postgres import ensure_system_user
from segsvc.local.processes import as_user, free_ports
from segsvc.postgres.engine import Databases
from segsvc.postgres.installation.migrate import migrate, verify
from tests.eventually import eventually
from tests.integration.secured.tls_gate import CERTIFICATE, KEY

PASSWORD = "p@ss/word:1"


def binaries() -> Path | None:
    """The distribution's newest PostgreSQL; None: none is installed, or it knows no TLS."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    if not found:
        return None
    folder = found[-1].parent
    built = subprocess.run([folder / "pg_config", "--configure"], capture_output=True, text=True, check=False).stdout
    return folder if "openssl" in built else None


@dataclass
class Server:
    port: int

    def dsn(self, database: str, host: str = "localhost", password: str = PASSWORD, **options: object) -> str:
        shown = "&".join(f"{name}={quote(str(value), safe='')}" for name, value in options.items())
        secret = quote(password, safe="")
        return f"postgresql+psycopg2://segsvc:{secret}@{host}:{self.port}/{database}?{shown}"


@pytest.fixture(scope="module")
def server(servers_folder: Path) -> Iterator[Server]:
    programs = binaries()
    if programs is None:
        pytest.skip("PostgreSQL with TLS is not installed; it comes with Debian's package postgresql")

    folder = servers_folder / "secured-postgres"
    folder.mkdir()
    user = ensure_system_user()
    [port] = free_ports(1)
    for name, source in (("cert.pem", CERTIFICATE), ("key.pem", KEY)):
        (folder / name).write_bytes(source.read_bytes())
    (folder / "password").write_text(PASSWORD)
    (folder / "key.pem").chmod(0o600)
    if user is not None:
        for path in (folder, *folder.iterdir()):
            shutil.chown(path, user, user)

    def run(*command: str | Path) -> None:
        subprocess.run(as_user(user, [str(word) for word in command]), cwd=folder, check=True, capture_output=True)

    data = folder / "data"
    run(
        *(programs / "initdb", f"--pgdata={data}", "--username=segsvc", f"--pwfile={folder / 'password'}", "--no-sync"),
        *("--auth=scram-sha-256", "--encoding=UTF8", "--locale=C"),
    )
    with (data / "postgresql.conf").open("a") as config:
        config.write(
            f"listen_addresses = '127.0.0.1'\nport = {port}\nunix_socket_directories = ''\nfsync = off\n"
            f"ssl = on\nssl_cert_file = '{folder}/cert.pem'\nssl_key_file = '{folder}/key.pem'\n"
            "max_prepared_transactions = 16\nclient_connection_check_interval = 1s\nshared_buffers = 32MB\n"
        )
    (data / "pg_hba.conf").write_text("hostssl all all 127.0.0.1/32 scram-sha-256\n")

    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            as_user(user, [str(programs / "postgres"), "-D", str(data)]), cwd=folder, stdout=log, stderr=log
        )
    try:
        eventually(lambda: "ready to accept connections" in (folder / "log").read_text())
        yield Server(port)
    finally:
        process.terminate()
        process.wait(30)


def settings(server: Server) -> Settings:
    """Settings of an installation with two shards, over encrypted connections to a verified server."""
    options: dict[str, object] = {"sslmode": "verify-full", "sslrootcert": CERTIFICATE}
    return Settings(
        _env_file=None,
        cluster="secured",
        catalog_dsn=server.dsn("catalog", **options),
        shard_dsns=tuple(server.dsn(f"shard{shard}", **options) for shard in range(2)),
    )


@pytest.fixture(scope="module")
def installation(server: Server) -> Settings:
    found = settings(server)
    engine = sa.create_engine(found.catalog_dsn.replace("/catalog?", "/postgres?"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for name in ("catalog", "shard0", "shard1"):
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
    engine.dispose()
    migrate(found)
    return found


def test_an_installation_works_over_verified_connections(installation: Settings) -> None:
    assert [finding for finding in verify(installation) if finding.fatal] == []

    databases = Databases(installation, "test")
    query = sa.text("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
    try:
        for engine in (databases.catalog, *databases.shards):
            with engine.connect() as connection:
                assert connection.execute(query).scalar_one() is True
    finally:
        databases.close()


@pytest.mark.parametrize(
    ("said", "host", "password", "options"),
    [
        ("no encryption", "localhost", PASSWORD, {"sslmode": "disable"}),
        ("certificate verify failed", "localhost", PASSWORD, {"sslmode": "verify-full", "sslrootcert": "system"}),
        (
            "does not match host name",
            "local.localhost",
            PASSWORD,
            {"sslmode": "verify-full", "sslrootcert": CERTIFICATE},
        ),
        ("password authentication failed", "localhost", "x", {"sslmode": "verify-full", "sslrootcert": CERTIFICATE}),
    ],
    ids=["encryption", "authority", "name", "password"],
)
def test_what_is_wrong_is_refused(
    server: Server, said: str, host: str, password: str, options: dict[str, object]
) -> None:
    # The name is not looked up: hostaddr says where the server is.
    engine = sa.create_engine(server.dsn("postgres", host, password, hostaddr="127.0.0.1", **options))
    with pytest.raises(sa.exc.OperationalError, match=said):
        engine.connect()
