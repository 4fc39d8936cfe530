"""Lookups of many users in pieces give one answer for each user, and leave no reply for the next lookup."""

from __future__ import annotations

from contextlib import closing

import pytest

from segsvc.domain.errors import Reason, ServiceError
from segsvc.local.redis import RedisServer
from tests.installation import Installation
from tests.integration.cache.conftest import SHARDS, World

USERS = 40


@pytest.fixture
def filled(world: World) -> list[int]:
    """Users; every third user is cached."""
    users = world.add_users(USERS)
    world.add_segment("all", users)
    world.fill(*users[::3])
    world.reader.connect()
    return users


@pytest.mark.parametrize("size", [1, 7, USERS, 1000])
def test_pieces_are_the_whole(world: World, filled: list[int], size: int) -> None:
    with closing(world.reader.lookups(filled, size)) as pieces:
        found = [entry for piece in pieces for entry in piece]
    assert found == world.reader.lookup(filled)
    assert [entry is not None for entry in found] == [n % 3 == 0 for n in range(USERS)]


def test_no_users_give_no_piece(world: World, filled: list[int]) -> None:
    assert list(world.reader.lookups([], 10)) == []
    assert world.reader.lookup([]) == []
    assert world.reader.connected


def test_a_piece_that_is_not_taken_answers_no_other_lookup(world: World, filled: list[int]) -> None:
    with closing(world.reader.lookups(filled, 5)) as pieces:
        next(pieces)
    assert not world.reader.connected, "the connection still has replies for somebody who has left"
    world.reader.connect()
    assert [entry is not None for entry in world.reader.lookup(filled)] == [n % 3 == 0 for n in range(USERS)]


def test_a_piece_asked_for_after_a_change_shows_it(world: World, filled: list[int]) -> None:
    with closing(world.reader.lookups(filled, 4)) as pieces:
        before = next(pieces)
        world.client.drop_generations(range(SHARDS))
        after = list(pieces)
    assert any(before)
    # Two commands were already on their way, and the next command was sent before the first piece was returned.
    assert [any(piece) for piece in after[2:]] == [False] * (USERS // 4 - 3)


def test_server_that_dies_between_pieces(installation: Installation, own_cache: RedisServer) -> None:
    world = World(installation, own_cache)
    users = world.add_users(USERS)
    world.reader.connect()
    pieces = world.reader.lookups(users, 1)
    next(pieces)

    own_cache.kill()

    with pytest.raises(ServiceError) as refused:
        list(pieces)
    assert refused.value.reason is Reason.CACHE_UNAVAILABLE
    assert not world.reader.connected

    world.close()
