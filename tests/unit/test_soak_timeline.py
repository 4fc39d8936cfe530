"""The soak's judge: which answers it must accept, and which it must not."""

from __future__ import annotations

from tests.soak.timeline import ABSENT, History, SegmentRule, Timeline

ALL = SegmentRule(salt=1, threshold=100_000)
NOBODY = SegmentRule(salt=1, threshold=0)


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


def test_forgetting_keeps_what_later_reads_may_see() -> None:
    values = Timeline(0)
    for n in range(1, 4):
        values.begin(n, float(n)).end = n + 0.5
    values.forget(3.2)
    assert values.possible(3.2, 4.0) == [2, 3]
