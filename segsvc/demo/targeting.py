"""The demonstration's chapters about single users: a condition, a preview, explanations, overrides, a changed user."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence

from segmentation.v1 import membership_pb2

from segsvc.demo.client import Client
from segsvc.demo.screen import Screen
from segsvc.demo.waiting import wait_for

TARGETED = "winter-sale"
PERCENT = 40.0
CONDITION = 'user.country in ["BR", "MX"] && user.platform != "web" && user.age >= 18'
OVERRIDE_S = 3.0
"""Time until the short override expires."""
UPDATE_TIMEOUT_S = 30.0

Reason = membership_pb2.CheckMembershipResponse
Override = membership_pb2.Override


def holds(attributes: Mapping[str, object]) -> bool:
    """CONDITION written again in Python, so that the service's counts are compared with an independent result."""
    age = attributes.get("age")
    return (
        attributes["country"] in ("BR", "MX") and attributes["platform"] != "web" and isinstance(age, int) and age >= 18
    )


class Targeting:
    """Args:
    ids: existing users, among which examples are chosen.
    matching: number of users, of all users, for whom the condition holds.
    send: sends an event (topic, user id, the event's JSON) and returns when Kafka has it.
    """

    def __init__(
        self,
        client: Client,
        screen: Screen,
        ids: Sequence[int],
        matching: int,
        send: Callable[[str, int, bytes], None],
    ) -> None:
        self._client = client
        self._screen = screen
        self._ids = ids
        self._matching = matching
        self._send = send

    def run(self) -> None:
        self._roll_out()
        found = self._explain()
        self._override(found)
        self._change(found)

    def _roll_out(self) -> None:
        self._screen.chapter(f"A rollout to {PERCENT:.0f} % of the users who meet a condition")
        self._screen.say(CONDITION)
        with self._screen.step("preview it", f"{self._matching:,} users match; nothing changes") as step:
            before = self._client.statistics(TARGETED).member_count
            preview = self._client.preview(TARGETED, PERCENT, CONDITION)
            after = self._client.statistics(TARGETED).member_count
            step.expect(
                preview.matched_count == self._matching and before == after,
                f"{preview.matched_count:,} match, {preview.added_count:,} would come and {preview.removed_count:,} go",
            )

        with self._screen.step("roll it out", "the numbers of the preview") as step:
            done = self._client.roll_out(TARGETED, PERCENT, CONDITION)
            same = all(
                getattr(done, count) == getattr(preview, count)
                for count in ("matched_count", "added_count", "removed_count", "member_count")
            )
            step.expect(
                same, f"{done.added_count:,} came, {done.removed_count:,} went, {done.member_count:,} are members"
            )

    def _explain(self) -> dict[Reason.Reason.ValueType, int]:
        """Find one user for each reason and print them as a table. Returns reason → user id."""
        reasons = (Reason.IN_ROLL_OUT, Reason.OUTSIDE_PERCENTAGE, Reason.CONDITION_NOT_MET)
        found: dict[Reason.Reason.ValueType, int] = {}
        table = self._screen.table("user", "in?", "why")

        with self._screen.step(f"why is a user in {TARGETED}?", "each explained, and equal to the user's list") as step:
            agree = True
            for user_id in self._ids:
                answer = self._client.check(user_id, TARGETED)
                agree &= answer.member == (TARGETED in self._client.user_segments(user_id))
                if answer.reason not in found:
                    found[answer.reason] = user_id
                    table.add_row(str(user_id), "yes" if answer.member else "no", answer.explanation)
                if len(found) == len(reasons):
                    break
            step.expect(agree and set(found) == set(reasons), ", ".join(Reason.Reason.Name(reason) for reason in found))
        self._screen.console.print(table)

        return found

    def _override(self, found: Mapping[Reason.Reason.ValueType, int]) -> None:
        self._screen.chapter("Some users are put in or out by hand")
        outside, inside = found[Reason.OUTSIDE_PERCENTAGE], found[Reason.IN_ROLL_OUT]

        with self._screen.step(f"exclude user {inside}", "not in the list of the next read") as step:
            self._client.override(inside, TARGETED, Override.EXCLUDE)
            answer = self._client.check(inside, TARGETED)
            step.expect(
                TARGETED not in self._client.user_segments(inside) and answer.reason == Reason.EXCLUDED_BY_OVERRIDE,
                answer.explanation,
            )

        with self._screen.step("clear it", "what the rule says, again") as step:
            self._client.clear_override(inside, TARGETED)
            step.expect(TARGETED in self._client.user_segments(inside), f"{TARGETED} is back")

        with self._screen.step(f"include user {outside} for {OVERRIDE_S:.0f} s", "in at once, out on time") as step:
            ends = time.time() + OVERRIDE_S
            self._client.override(outside, TARGETED, Override.INCLUDE, expire_time=ends)
            at_once = TARGETED in self._client.user_segments(outside)
            asked = time.time()
            while TARGETED in self._client.user_segments(outside) and asked < ends + 10:
                asked = time.time()
            late_s = time.time() - ends
            # The first read without the segment was answered after the expiry, up to the precision of the cache.
            step.expect(
                at_once and -0.01 < late_s < 1,
                f"{'in' if at_once else 'not in'} at once, out {1000 * late_s:.0f} ms after its end",
            )

    def _change(self, found: Mapping[Reason.Reason.ValueType, int]) -> None:
        self._screen.chapter("A user moves")
        mover = found[Reason.IN_ROLL_OUT]

        with self._screen.step(f"send update-user: {mover} is in FR now", f"no longer in {TARGETED}") as step:
            event = {"user_id": mover, "version": 1, "attributes": {"country": "FR", "platform": "ios", "age": 30}}
            started = time.monotonic()
            self._send("update-user", mover, json.dumps(event).encode())
            wait_for(lambda: TARGETED not in self._client.user_segments(mover), UPDATE_TIMEOUT_S, poll_s=0.01)
            answer = self._client.check(mover, TARGETED)
            step.expect(
                answer.reason == Reason.CONDITION_NOT_MET and TARGETED not in self._client.user_segments(mover),
                f"{answer.explanation}, {time.monotonic() - started:.2f} s after the event",
            )
