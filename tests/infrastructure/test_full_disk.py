"""A shard's disk is full: a write without room is refused or brings the server down, and nothing is half done."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

import pytest

from segsvc.local.processes import LocalStackError
from tests.eventually import eventually
from tests.infrastructure.conftest import SMALL_DISK_MB
from tests.infrastructure.system import ALONE, SHARDS, System

pytestmark = pytest.mark.infrastructure
FILLER = """
INSERT INTO memberships (block, segment_id, bits)
SELECT n, -1, decode(repeat('00', 127) || '01', 'hex') FROM generate_series(1, 100000) n
"""


@contextmanager
def full(disk: Path, system: System) -> Iterator[None]:
    """Leave no room in this file system, nor in the existing pages of the shard's bits, as long as the block lasts."""
    ballast = disk / "ballast"
    # Space that autovacuum frees meanwhile would be room again.
    system.installation.execute(ALONE, "ALTER TABLE memberships SET (autovacuum_enabled = off)")

    try:
        with ballast.open("wb", buffering=0) as file:
            for _ in range(2):
                fill(file)
                # The rows are rolled back, but keep their places: every new row needs a new page.
                with pytest.raises(LocalStackError, match="No space left"):
                    system.alone.psql(FILLER, f"shard_{ALONE}")
        yield
    finally:
        ballast.unlink()
        system.alone.start()  # if the full disk has ended it
        system.installation.execute(ALONE, "ALTER TABLE memberships RESET (autovacuum_enabled)")


def fill(file: FileIO) -> None:
    """Write until nothing fits."""
    for size in (1 << 20, 4096, 1):
        try:
            while file.write(bytes(size)) == size:
                assert file.tell() < SMALL_DISK_MB << 20
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


@pytest.mark.parametrize("log_is_full", [False, True])
def test_a_shards_disk_is_full(system: System, slug: str, small_disk: Path | None, log_is_full: bool) -> None:
    if small_disk is None:
        pytest.skip("this machine does not let us mount a file system")

    system.new_segment(slug, 0)

    with system.armed("locked-not-prepared", f"hold shard={ALONE}") as point:
        name = system.client.start_roll_out(slug, 60)
        point.await_fired()
        with full(small_disk, system):
            if log_is_full:
                # The write-ahead log has no room either: PostgreSQL does not survive a write that it cannot log.
                with pytest.raises(LocalStackError, match=r"No space left|closed the connection|connection to server"):
                    system.alone.psql("SELECT pg_switch_wal(), txid_current(); SELECT pg_switch_wal(), txid_current()")

            seen = system.log_ends()
            point.release()
            eventually(lambda: "SHARD_UNAVAILABLE" in system.logged(seen))
            eventually(lambda: system.votes(name) == set(range(SHARDS)) - {ALONE})
            assert system.prepared_on(name, [0, 2]) == {0, 2}
            assert system.state(name) == "PREPARING"

    eventually(lambda: system.state(name) == "DONE")
    system.expect_well(slug, 60)
