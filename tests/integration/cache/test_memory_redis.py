"""The simulation's Redis answers as the real Redis does, to random sequences of all commands of the cache protocol."""

from __future__ import annotations

import random

import pytest

from segsvc.cache import scripts
from segsvc.cache.entry import FORMAT
from segsvc.cache.keys import Keys
from segsvc.cache.patches import PatchNote, encode_note
from segsvc.domain.membership import NEVER_US
from tests.integration.cache.conftest import World
from tests.simulation.memory_redis import MemoryRedis

SHARD = 0
NAMES = Keys(b"0")
KEYS = NAMES.users(SHARD, (1, 2, 3))
TOKENS = (b"t1", b"t2", b"t3")
NONCES = (b"n" * 10, b"m" * 10)
NOW_US = 1_000_000


P = NAMES.patches(SHARD)
CHUNKS = [NAMES.chunk(SHARD, bytes((token,)) * 16, number) for token in b"ab" for number in (0, 1)]
EVERYTHING = ("MGET", NAMES.generation(SHARD), P, *KEYS, *CHUNKS)


def value(nonce: bytes, valid_until_us: int, *, epoch: int = 0, segments: int = 1, cut: int = 0) -> bytes:
    fields = valid_until_us.to_bytes(8, "little", signed=True) + bytes(16)
    fields += epoch.to_bytes(4, "little") + bytes(4 + 4 * segments)
    made = b"V" + nonce + FORMAT + fields
    return made[: len(made) - cut]


def command(draw: random.Random, run_id: bytes) -> tuple[bytes | str | int, ...]:
    """One of the commands of ``CacheClient`` and ``CacheReader``, with arguments that often coincide."""
    keys = draw.sample(KEYS, draw.randint(1, 3))
    token, nonce = draw.choice(TOKENS), draw.choice(NONCES)

    stored = [
        value(
            draw.choice(NONCES),
            draw.choice((NEVER_US, NOW_US, NOW_US + 1, 5)),
            epoch=draw.randrange(5),
            segments=draw.randrange(3),
            cut=draw.choice((0, 0, 0, 1, 4, 30)),
        )
        for _ in keys
    ]

    run = draw.choice((run_id, run_id, b"x" * 40))
    acquire = (run, nonce, token, b"10000", b"%d" % NOW_US, FORMAT, draw.choice((b"", b"", b"1", b"4")))
    epoch = draw.randrange(1, 5)
    item = encode_note(PatchNote(epoch, 7, draw.choice(b"ab").to_bytes() * 16, NEVER_US))
    read = (
        NAMES.chunk_prefix(SHARD),
        draw.randrange(5),
        draw.choice((1, 3, 9)),
        *draw.sample((0, 1), draw.randrange(3)),
    )

    return draw.choice(
        (
            ("EVALSHA", scripts.ACQUIRE.sha, 1 + len(keys), NAMES.generation(SHARD), *keys, *acquire),
            ("EVALSHA", scripts.FILL.sha, len(keys), *keys, token, b"60000", *stored),
            ("EVALSHA", scripts.RELEASE.sha, len(keys), *keys, token),
            ("EVALSHA", scripts.DROP_ENTRIES.sha, len(keys), *keys, token),
            ("EVALSHA", scripts.APPEND_PATCH.sha, 2, NAMES.generation(SHARD), P, run, b"%d" % epoch, item, b"2"),
            ("EVALSHA", scripts.APPEND_PATCH.sha, 2, NAMES.generation(SHARD), P, run, b"%d" % epoch, item, b"9"),
            ("EVALSHA", scripts.READ_PATCHES.sha, 1, P, *read),
            ("SET", draw.choice(CHUNKS), token, "PX", 60_000),
            ("SET", P, draw.choice((nonce, nonce + b"x", nonce + item)), "PX", 60_000),
            ("DEL", draw.choice((P, *CHUNKS))),
            ("SET", keys[0], b"B" + token, "PX", 60_000),
            ("SET", keys[0], stored[0], "PX", 60_000),
            ("DEL", NAMES.generation(SHARD)),
            ("MGET", NAMES.generation(SHARD), *KEYS),
        )
    )


@pytest.mark.parametrize("seed", range(5))
def test_both_answer_alike(world: World, seed: int) -> None:
    draw = random.Random(seed)
    memory = MemoryRedis(lambda: 0.0)
    with world.client.connection(SHARD) as connection:
        for _ in range(400):
            sent = command(draw, connection.run_id)
            answers = connection.run(*sent), memory.execute(sent)
            if sent[0] != "SET":  # no caller reads its status
                assert answers[0] == answers[1], sent
            assert connection.run(*EVERYTHING) == memory.execute(EVERYTHING), sent
