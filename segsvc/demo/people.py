"""Users for the demonstration: with skewed attributes, as real users have, and the same for the same seed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import numpy as np

_COUNTRIES = ("US", "IN", "BR", "DE", "RU", "GB", "FR", "JP", "MX", "NG", "ID", "PL", "TR", "EG", "VN", "KZ")
_PLATFORMS = ("android", "ios", "web")
_PLATFORM_SHARES = (0.58, 0.27, 0.15)
_VERSIONS = tuple(f"{major}.{minor}.0" for major in (5, 4, 3) for minor in range(9, -1, -1))
_TAGS = ("newsletter", "beta", "student", "premium", "family", "business", "night-owl", "winback")
_SIGNUP_DAYS = 3000
_ID_BITS = 40
_ID_STEP = 0x9E3779B97F4A7C15 | 1

BOUNDARY_USER = 2**63 - 1
"""The largest valid user id; always one of the users."""


def user_ids(count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Distinct ids spread over 40 bits, in the order of arrival; the last one is ``BOUNDARY_USER``.

    Multiplying by an odd number permutes the residues of a power of two, so no id comes twice.
    """
    index = np.arange(1, count + 1, dtype=np.uint64)
    ids = ((index * np.uint64(_ID_STEP)) & np.uint64(2**_ID_BITS - 1)).astype(np.int64) + 1
    ids[-1] = BOUNDARY_USER
    return ids


def event(user_id: int, attributes: Mapping[str, object]) -> bytes:
    """The create-user event."""
    return json.dumps({"user_id": user_id, "attributes": attributes}, separators=(",", ":")).encode()


def people(count: int, seed: int = 1, chunk: int = 10_000) -> Iterator[tuple[int, Mapping[str, object]]]:
    """Yields (user id, attributes) for each user.

    Countries and app versions follow a power law, ages a skewed bell, sign-ups grow over the years. Most users
    have no tag; a few users lack the attribute age.
    """
    random = np.random.default_rng(seed)
    ids = user_ids(count)
    country_shares = _zipf(len(_COUNTRIES), 1.1)
    version_shares = _zipf(len(_VERSIONS), 1.4)

    for first in range(0, count, chunk):
        n = min(chunk, count - first)
        countries = random.choice(len(_COUNTRIES), n, p=country_shares)
        platforms = random.choice(len(_PLATFORMS), n, p=_PLATFORM_SHARES)
        versions = random.choice(len(_VERSIONS), n, p=version_shares)
        ages = np.clip(random.gamma(6.0, 5.5, n) + 8, 13, 99).astype(int)
        days = (_SIGNUP_DAYS * np.sqrt(random.random(n))).astype(int)
        tag_counts = random.choice(4, n, p=(0.7, 0.2, 0.08, 0.02))
        no_age = random.random(n) < 0.03

        for i in range(n):
            attributes: dict[str, object] = {
                "country": _COUNTRIES[countries[i]],
                "platform": _PLATFORMS[platforms[i]],
                "app_version": _VERSIONS[versions[i]],
                "signup_day": int(days[i]),
            }
            if not no_age[i]:
                attributes["age"] = int(ages[i])
            if tag_counts[i]:
                attributes["tags"] = [_TAGS[(first + i + t) % len(_TAGS)] for t in range(tag_counts[i])]
            yield int(ids[first + i]), attributes


def _zipf(n: int, exponent: float) -> list[float]:
    weights = [rank**-exponent for rank in range(1, n + 1)]
    return [weight / sum(weights) for weight in weights]
