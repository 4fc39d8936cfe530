"""A shard whose disk is full: what does not fit is refused, or brings its server down, and nothing is half done."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
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
def no_room(disk: Path) -> Iterator[None]:
    """Nothing can be written to this file system any more."""
    ballast = disk / "ballast"
    try:
        with ballast.open("wb", buffering=0) as file:
            try:
                for size in (1 << 20, 4096, 1):
                    try:
                        while file.write(bytes(size)) == size:
                            pass
                    except OSError as error:
                        if error.errno != errno.ENOSPC:
                            raise
            finally:
                assert file.tell() < SMALL_DISK_MB << 20
        yield
    finally:
        ballast.unlink()


@pytest.mark.parametrize("log_is_full", [False, True])
def test_a_shards_disk_is_full(system: System, slug: str, small_disk: Path | None, log_is_full: bool) -> None:
    if small_disk is None:
        pytest.skip("this machine does not let us mount a file system")
    system.new_segment(slug, 0)
    with no_room(small_disk):
        with pytest.raises(LocalStackError, match="No space left"):
            # All that is free in the pages there are is taken, by rows that are rolled back: the next row needs a page.
            system.alone.psql(FILLER, f"shard_{ALONE}")
        if log_is_full:
            # The write-ahead log has no room either: what PostgreSQL cannot log, it does not survive.
            with pytest.raises(LocalStackError, match=r"No space left|closed the connection|connection to server"):
                system.alone.psql("SELECT pg_switch_wal(), txid_current(); SELECT pg_switch_wal(), txid_current()")
        name = system.client.start_roll_out(slug, 60)
        eventually(lambda: system.votes(name) == set(range(SHARDS)) - {ALONE})
        seen = system.logged("worker-operations").count("SHARD_UNAVAILABLE")
        eventually(lambda: system.logged("worker-operations").count("SHARD_UNAVAILABLE") > seen)
        assert system.state(name) == "PREPARING"
    system.alone.start()
    eventually(lambda: system.state(name) == "DONE")
    system.expect_well(slug, 60)
