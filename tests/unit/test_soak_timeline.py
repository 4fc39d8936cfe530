"""The soak's judge: which answers it must accept, and which it must not."""

from __future__ import annotations

from tests.service_model import CONDITIONS, attributes_of
from tests.soak.timeline import ABSENT, History, SegmentRule, Timeline

ALL = SegmentRule(salt=1, threshold=100_000)
NOBODY = SegmentRule(salt=1, threshold=0)
USER, BY_VERSION = 1, (2, 1)
"""A user, and two conditions: the first holds for version 0 alone, the second for version 1 alone."""


def history(rules: Timeline[SegmentRule]) -> History:
    made = History({"a": rules})
    made.users[7] = Timeline(0)
    return made


def test_old_or_new_while_a_change_is_under_way_and_new_afterwards() -> None:
    rules = Timeline(NOBODY)
    judge = history(rules)
    change = rules.begin(ALL, 10.0)
    old, new = frozenset[str](), frozenset({"a"})

    assert judge.wrong(7, new, 8.0, 9.0)  # before the change was requested
    assert not judge.wrong(7, old, 8.0, 9.0)
    for answer in (old, new):
        assert not judge.wrong(7, answer, 9.0, 11.0)
        assert not judge.wrong(7, answer, 30.0, 31.0)  # still not acknowledged

    change.end = 20.0
    assert not judge.wrong(7, old, 19.0, 30.0)
    assert judge.wrong(7, old, 20.1, 30.0)
    assert not judge.wrong(7, new, 20.1, 30.0)


def test_what_was_aborted_was_never_true() -> None:
    rules = Timeline(NOBODY)
    judge = history(rules)
    rules.withdraw(rules.begin(ALL, 10.0))
    assert judge.wrong(7, frozenset({"a"}), 11.0, 12.0)


def test_a_deleted_user_is_not_found_and_a_present_one_is() -> None:
    judge = history(Timeline(NOBODY))
    assert judge.wrong(7, None, 1.0, 2.0)
    leaving = judge.users[7].begin(ABSENT, 3.0)
    assert not judge.wrong(7, None, 2.0, 4.0)
    assert not judge.wrong(7, frozenset(), 2.0, 4.0)
    leaving.end = 5.0
    assert judge.wrong(7, frozenset(), 6.0, 7.0)


def test_an_override_counts_from_its_acknowledgement() -> None:
    judge = history(Timeline(NOBODY))
    forced = judge.overrides[7, "a"] = Timeline[bool | None](None)
    forced.begin(True, 1.0).end = 2.0
    assert judge.wrong(7, frozenset(), 3.0, 4.0)
    assert not judge.wrong(7, frozenset({"a"}), 3.0, 4.0)


def test_a_list_that_mixes_two_moments_is_wrong() -> None:
    first, second = Timeline(NOBODY), Timeline(NOBODY)
    judge = History({"a": first, "b": second})
    judge.users[7] = Timeline(0)
    first.begin(ALL, 10.0).end = 12.0
    second.begin(ALL, 20.0).end = 22.0

    # Each segment alone may be old or new during this read.
    for answer in (frozenset[str](), frozenset({"a"}), frozenset({"a", "b"})):
        assert not judge.wrong(7, answer, 5.0, 30.0)
    assert judge.wrong(7, frozenset({"b"}), 5.0, 30.0)

    # The first one was acknowledged before this read.
    assert not judge.wrong(7, frozenset({"a"}), 21.0, 21.5)
    assert judge.wrong(7, frozenset(), 21.0, 21.5)


def test_changes_that_overlap_may_be_seen_in_either_order() -> None:
    first, second = Timeline(NOBODY), Timeline(NOBODY)
    judge = History({"a": first, "b": second})
    judge.users[7] = Timeline(0)
    first.begin(ALL, 10.0).end = 20.0
    second.begin(ALL, 12.0).end = 18.0
    for answer in (frozenset[str](), frozenset({"a"}), frozenset({"b"}), frozenset({"a", "b"})):
        assert not judge.wrong(7, answer, 13.0, 30.0)


def test_all_segments_of_a_list_are_of_one_version_of_the_user() -> None:
    # A user whose version decides: in the segment of one condition as version 0, and of the other as version 1.
    versions = {
        condition: {version: CONDITIONS[condition].holds(attributes_of(USER, version)) for version in (0, 1)}
        for condition in BY_VERSION
    }
    assert [list(by.values()) for by in versions.values()] == [[True, False], [False, True]]

    one, other = (Timeline(SegmentRule(1, 100_000, condition)) for condition in BY_VERSION)
    judge = History({"a": one, "b": other})
    judge.users[USER] = Timeline(0)
    judge.users[USER].begin(1, 10.0)

    assert not judge.wrong(USER, frozenset({"a"}), 11.0, 12.0)
    assert not judge.wrong(USER, frozenset({"b"}), 11.0, 12.0)
    for mixed in (frozenset[str](), frozenset({"a", "b"})):
        assert judge.wrong(USER, mixed, 11.0, 12.0)


def test_forgetting_keeps_what_later_reads_may_see() -> None:
    values = Timeline(0)
    for n in range(1, 4):
        values.begin(n, float(n)).end = n + 0.5
    values.forget(3.2)
    assert values.possible(3.2, 4.0) == [2, 3]
