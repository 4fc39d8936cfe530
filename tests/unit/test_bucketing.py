"""The two ways of asking for many users' buckets give the same answers."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from segsvc.domain.bucketing import BUCKETS, UserHashes, bucket, buckets

user_ids = st.lists(st.integers(1, 2**63 - 1), min_size=1, max_size=50)
salts = st.integers(0, 2**64 - 1)


@given(
    ids=user_ids,
    salt=salts,
    threshold=st.one_of(st.integers(0, BUCKETS), st.sampled_from([0, 1, BUCKETS - 1, BUCKETS])),
)
def test_below_a_threshold_as_the_bucket_says(ids: list[int], salt: int, threshold: int) -> None:
    users = np.array(ids, dtype=np.int64)
    assert UserHashes(users).below(salt, threshold).tolist() == (buckets(users, salt) < threshold).tolist()


@given(ids=user_ids, salt=salts)
def test_at_the_very_bucket(ids: list[int], salt: int) -> None:
    hashes = UserHashes(np.array(ids, dtype=np.int64))
    for n, user_id in enumerate(ids):
        own = bucket(user_id, salt)
        assert not hashes.below(salt, own)[n]
        assert hashes.below(salt, own + 1)[n]
