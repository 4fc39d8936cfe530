"""The published hash that decides which users are below a percentage. ``docs/architecture.md`` has its test vectors.

The mixing step is the finaliser of splitmix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators,
2014). Both implementations below give the same numbers; the tests compare them with the published vectors and with
each other.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

BUCKETS = 100_000
"""Buckets are 0 … 99,999: a thousandth of a percent each."""

_IN_CACHE = 32_768
"""Users hashed per chunk: the twelve passes over a chunk stay in a core's cache and allocate no memory."""

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def bucket(user_id: int, salt: int) -> int:
    """Bucket of one user in one segment.

    Args:
        user_id: 1 … 2**63 - 1.
        salt: the segment's, 0 … 2**64 - 1.
    """
    z = (salt + user_id * _GOLDEN) & _MASK
    z ^= z >> 30
    z = (z * _MIX_1) & _MASK
    z ^= z >> 27
    z = (z * _MIX_2) & _MASK
    z ^= z >> 31
    return ((z >> 32) * BUCKETS) >> 32


class UserHashes:
    """Many users, asked for one segment after another whether their bucket is below a threshold.

    The part of the hash that does not depend on the segment is computed once. The step that turns a hash into a bucket
    is left out. So a segment costs half of what ``buckets`` costs.
    """

    def __init__(self, user_ids: npt.NDArray[np.int64]) -> None:
        self._spread = user_ids.astype(np.uint64)
        self._spread *= np.uint64(_GOLDEN)
        self._shifted = np.empty_like(self._spread)
        self._hashed = np.empty_like(self._spread)

    def below(self, salt: int, threshold: int) -> npt.NDArray[np.bool_]:
        """``buckets(user_ids, salt) < threshold``."""
        if threshold >= BUCKETS:
            return np.ones(self._spread.shape, dtype=np.bool_)

        z, t = self._hashed, self._shifted
        np.add(self._spread, np.uint64(salt), out=z)
        z ^= np.right_shift(z, np.uint64(30), out=t)
        z *= np.uint64(_MIX_1)
        z ^= np.right_shift(z, np.uint64(27), out=t)
        z *= np.uint64(_MIX_2)
        z ^= np.right_shift(z, np.uint64(31), out=t)

        # bucket = (high × BUCKETS) >> 32 < threshold, exactly if high < threshold × 2**32 / BUCKETS, rounded up.
        high = -(-(max(threshold, 0) << 32) // BUCKETS)
        return z < np.uint64(high << 32)


def buckets(user_ids: npt.NDArray[np.int64], salt: int) -> npt.NDArray[np.int64]:
    """Buckets of many users in one segment. ``user_ids`` has any shape; the result has the same one.

    Unsigned 64-bit arithmetic wraps in numpy, as the definition requires.
    """
    hashed = user_ids.astype(np.uint64, order="C")
    flat = hashed.reshape(-1)  # a view
    shifted = np.empty(min(flat.size, _IN_CACHE), dtype=np.uint64)

    for first in range(0, flat.size, _IN_CACHE):
        z = flat[first : first + _IN_CACHE]
        t = shifted[: z.size]
        z *= np.uint64(_GOLDEN)
        z += np.uint64(salt)
        z ^= np.right_shift(z, np.uint64(30), out=t)
        z *= np.uint64(_MIX_1)
        z ^= np.right_shift(z, np.uint64(27), out=t)
        z *= np.uint64(_MIX_2)
        z ^= np.right_shift(z, np.uint64(31), out=t)
        z >>= np.uint64(32)
        z *= np.uint64(BUCKETS)
        z >>= np.uint64(32)

    return hashed.view(np.int64)
