"""``segsvc check``, as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from segsvc.cache.client import CacheClient
from segsvc.config import Settings
from tests.integration.check.checking import flip
from tests.integration.check.test_check import an_id_of_the_directory, the_counter_of_the_users
from tests.integration.check.world import World


def command(settings: Settings, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SEGSVC_")}
    environment |= {
        "SEGSVC_ENV_FILE": "",
        "SEGSVC_CLUSTER": settings.cluster,
        "SEGSVC_CATALOG_DSN": settings.catalog_dsn,
        "SEGSVC_SHARD_DSNS": " ".join(settings.shard_dsns),
        "SEGSVC_CACHE_URL": settings.cache_url,
    }

    return subprocess.run(
        [sys.executable, "-m", "segsvc", "check", *arguments],
        env=environment, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def test_the_command_ends_with_0_on_a_sound_installation(
    world: World, cache: CacheClient, check_settings: Settings
) -> None:
    world.fill(cache)
    done = command(check_settings)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("no difference in 2,997 users, 7 segments, ")
    done = command(check_settings, "--json")
    assert done.returncode == 0
    report = json.loads(done.stdout)
    assert (report["ok"], report["differences"], report["entries"]) == (True, [], 2997)


def test_the_command_names_each_of_four_faults_and_ends_with_1(
    world: World, cache: CacheClient, check_settings: Settings
) -> None:
    """The faults are one bit, one id of the directory, one counter and one cache entry."""
    world.fill(cache)
    cache.drop_entries(1, [43])
    world.fill_users(cache, {43: ()})

    flip(world, 1, 8, 2001)
    world.on_shard(1, "UPDATE segments SET rule_count = rule_count - 1 WHERE id = 8")
    an_id_of_the_directory(world)
    the_counter_of_the_users(world)

    done = command(check_settings)
    assert done.returncode == 1

    lines = done.stdout.splitlines()
    assert lines[-1].startswith("4 differences in 2,997 users")
    assert set(lines[:-1]) == {
        "shard 0, directory, block 1, slot 100: it names user 5, the users' rows say user 2250",
        "shard 1, shard_state: user_count is 1498, there are 1499 users",
        "shard 1, segment beta (8), user 2001 (block 0, bit 1000): bit is 0, the rule says 1",
        f"shard 1, cache entry of user 43: it lists segments [], the shard says {list(world.listed(43))}",
    }


def test_the_command_says_what_cannot_be_reached(world: World, check_settings: Settings) -> None:
    gone = check_settings.model_copy(update={"cache_url": "redis://127.0.0.1:1/0"})
    done = command(gone)
    assert done.returncode == 1
    assert done.stderr.startswith("CACHE_UNAVAILABLE: ")
    assert command(gone, "--without-cache").returncode == 0

    gone = check_settings.model_copy(update={"shard_dsns": (check_settings.shard_dsns[0], "postgresql+psycopg2:///no")})
    done = command(gone)
    assert (done.returncode, done.stderr) == (1, "SHARD_UNAVAILABLE: shard 1 cannot be reached now\n")
