"""The steps of the demonstration, in order. Each states what it expects before it checks."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from pathlib import Path

from kafka import KafkaProducer

from segsvc.config import Settings
from segsvc.demo.client import Client
from segsvc.demo.inside import Inside
from segsvc.demo.people import BOUNDARY_USER, event, people, user_ids
from segsvc.demo.screen import Screen, StepFailed, as_percent
from segsvc.demo.targeting import Targeting, holds
from segsvc.demo.waiting import wait_for
from segsvc.kafka_options import connection_options

SEGMENTS = (
    ("checkout-v2", "The new checkout"),
    ("dark-mode", "Dark colours by default"),
    ("free-delivery", "Free delivery experiment"),
    ("search-ranking", "Ranking model 7"),
    ("winter-sale", "Winter sale banner"),
)
ROLLED_OUT = SEGMENTS[0][0]
DELETED = SEGMENTS[1][0]
PROTECTED_POINT = "prepared-not-voted"
READABLE_TIMEOUT_S = 600.0
WARM_TIMEOUT_S = 30.0
WARM_SHARE = 0.95


class Story:
    def __init__(self, settings: Settings, users: int, screen: Screen) -> None:
        if settings.failpoint_dir is None:
            raise ValueError("the demonstration holds a worker at a failpoint: SEGSVC_FAILPOINT_DIR must be set")

        self._settings = settings
        self._users = users
        self._ids = [int(user_id) for user_id in user_ids(users)]
        self._matching = 0
        self._screen = screen
        self._failpoints = settings.failpoint_dir

        self._client = Client.of(settings)
        self._inside = Inside(settings)
        self._producer = KafkaProducer(
            **connection_options(settings),
            linger_ms=20,
            batch_size=256 << 10,
            # The in-memory stand-in knows no idempotent producers.
            enable_idempotence=not settings.kafka_stand_in,
        )

    def close(self) -> None:
        self._producer.close(timeout=5)
        self._client.close()
        self._inside.close()

    def run(self) -> None:
        """Run all steps. Raises StepFailed after the last one if a step did not find what it expected."""
        self._client.wait_ready(30)
        self._arrive()
        self._create()
        self._ramp()
        self._survive()
        self._look()
        self._target()
        self._warm()
        self._delete_segment()
        self._leave()
        self._check()

        if not self._screen.all_ok:
            raise StepFailed

    def _arrive(self) -> None:
        self._screen.chapter(f"{self._users:,} users arrive over Kafka")
        started = time.monotonic()
        with self._screen.step("send create-user events", "every event acknowledged by Kafka") as step:
            with self._screen.bar("sending", self._users) as bar:
                for sent, (user_id, attributes) in enumerate(people(self._users), 1):
                    self._matching += holds(attributes)
                    self._producer.send("create-user", key=str(user_id).encode(), value=event(user_id, attributes))
                    if sent % 10_000 == 0:
                        bar.to(sent)
                self._producer.flush()
            seconds = time.monotonic() - started
            step.expect(True, f"{self._users:,} events, {self._users / seconds:,.0f}/s")

        with self._screen.step("all users readable", f"{self._users:,} users on the shards") as step:
            with self._screen.bar("arriving", self._users) as bar:

                def arrived() -> bool:
                    count = self._inside.user_count()
                    bar.to(count)
                    return count >= self._users

                wait_for(arrived, READABLE_TIMEOUT_S, poll_s=0.5)
            seconds = time.monotonic() - started
            count = self._inside.user_count()
            step.expect(
                count == self._users,
                f"{count:,} users {seconds:.1f} s after the first event was sent, {count / seconds:,.0f}/s",
            )

        sample = [*self._ids[:: max(1, self._users // 20_000)], BOUNDARY_USER]
        with self._screen.step("read a sample over gRPC", f"{len(sample):,} users found, in no segment yet") as step:
            found = [slugs for _, slugs in self._client.many_user_segments(sample)]
            step.expect(found == [[]] * len(sample), f"{sum(slugs == [] for slugs in found):,} found, in no segment")

    def _near(self, share: float, percent: float, users: float | None = None) -> bool:
        """Whether a share of ``users`` (None: all users) is within five standard deviations of a binomial
        distribution: false by chance once in two million cases."""
        wanted = percent / 100
        return abs(share - wanted) < 5 * math.sqrt(wanted * (1 - wanted) / (users or self._users))

    def _create(self) -> None:
        self._screen.chapter("Product teams create segments")
        for slug, display_name in SEGMENTS:
            with self._screen.step(f"create {slug}", "an active segment without a rule") as step:
                segment = self._client.create(slug, display_name)
                rule = "a rule" if segment.HasField("rule") else "no rule"
                state = segment.State.Name(segment.state).lower()
                step.expect((state, rule) == ("active", "no rule"), f"{state}, {rule}")

        for slug, _ in SEGMENTS[1:]:
            with self._screen.step(f"roll {slug} out to 20 %", "about 20 % of all users") as step:
                share = self._client.roll_out(slug, 20).member_count / self._users
                step.expect(self._near(share, 20), f"{as_percent(share)} of the users")

    def _ramp(self) -> None:
        self._screen.chapter("A rollout to 10 %, then to 30 %")
        members: list[set[int]] = []
        for percent in (10, 30):
            with self._screen.step(f"roll {ROLLED_OUT} out to {percent} %", f"about {percent} % of all users") as step:
                response = self._client.roll_out(ROLLED_OUT, percent)
                share = response.member_count / self._users
                step.expect(
                    self._near(share, percent),
                    f"{response.added_count:,} added, {response.removed_count:,} removed, {as_percent(share)} are in",
                )

            with self._screen.step(f"export the {percent} %", "as many ids as members") as step:
                started = time.monotonic()
                exported = list(self._client.export(ROLLED_OUT))
                members.append(set(exported))
                rate = len(exported) / (time.monotonic() - started)
                step.expect(
                    len(exported) == len(members[-1]) == response.member_count,
                    f"{len(exported):,} ids, {rate:,.0f}/s",
                )

        with self._screen.step("compare the exports", "all of the first 10 % are among the 30 %") as step:
            lost = members[0] - members[1]
            step.expect(not lost, f"{len(members[0]):,} of {len(members[0]):,} still in" if not lost else f"{lost=}")

    def _survive(self) -> None:
        self._screen.chapter("A worker dies in the middle of a rollout")
        fired = self._failpoints / f"{PROTECTED_POINT}.fired"
        fired.unlink(missing_ok=True)
        point = self._failpoints / PROTECTED_POINT
        shard = self._settings.shard_count - 1

        with self._screen.step(
            f"roll {ROLLED_OUT} out to 50 %, kill -9 the worker of shard {shard}", "the rollout finishes by itself"
        ) as step:
            point.write_text(f"hold shard={shard}")
            try:
                name = self._client.start_roll_out(ROLLED_OUT, 50)
                if not wait_for(fired.exists, 10, poll_s=0.01):
                    step.expect(False, "no worker came to the failpoint")
                    return

                victim = fired.read_text().split()[0]
                # The process kills itself with SIGKILL at the failpoint, because it may run in another container.
                # The file is renamed into place: a half-written file would let the process continue.
                order = point.with_suffix(".order")
                order.write_text(f"kill shard={shard}")
                order.replace(point)
                if not wait_for(lambda: len(fired.read_text().splitlines()) > 1, 10, poll_s=0.01):
                    step.expect(False, f"process {victim} did not die")
                    return
                killed = time.monotonic()
            finally:
                point.unlink(missing_ok=True)

            self._screen.note(f"shard {shard} is prepared, its vote is missing; process {victim} is dead")
            last = None
            for metadata in self._client.watch(name):
                last = metadata
            seconds = time.monotonic() - killed
            state = last.State.Name(last.state) if last else "unknown"
            step.expect(state == "DONE", f"{state} {seconds:.1f} s after the kill")

        with self._screen.step("count the members", "50 % on every shard") as step:
            statistics = self._client.statistics(ROLLED_OUT)
            # The demonstration's ids are spread evenly over any number of shards.
            each = self._users / self._settings.shard_count
            step.expect(
                len(statistics.shards) == self._settings.shard_count
                and all(self._near(part.member_count / each, 50, each) for part in statistics.shards)
                and statistics.member_count == statistics.rule_count,
                f"{statistics.member_count:,} of {statistics.user_count:,}: "
                + ", ".join(f"shard {part.shard}: {part.member_count:,}" for part in statistics.shards),
            )

    def _look(self) -> None:
        self._screen.chapter("What the gateway sees")
        table = self._screen.table("user", "segments")
        with self._screen.step("list some users' segments", "each list sorted, and of live segments only") as step:
            lists = {user_id: self._client.user_segments(user_id) for user_id in (*self._ids[:4], BOUNDARY_USER)}
            known = {slug for slug, _ in SEGMENTS}
            for user_id, slugs in lists.items():
                table.add_row(str(user_id), ", ".join(slugs) or "none")
            step.expect(
                all(slugs == sorted(slugs) and known.issuperset(slugs) for slugs in lists.values()),
                f"{len(lists)} users",
            )
        self._screen.console.print(table)

        table = self._screen.table("segment", "members", "share")
        with self._screen.step("statistics of every segment", f"counted over {self._users:,} users") as step:
            counted = [self._client.statistics(slug) for slug, _ in SEGMENTS]
            for statistics in counted:
                table.add_row(
                    statistics.segment.slug, f"{statistics.member_count:,}", as_percent(statistics.member_share)
                )
            step.expect(all(statistics.user_count == self._users for statistics in counted), f"{len(counted)} segments")
        self._screen.console.print(table)

    def _target(self) -> None:
        # Users who do not leave in a later chapter, so that each chapter is independent.
        looked_at = self._ids[len(self._ids) // 2 :]
        Targeting(self._client, self._screen, looked_at, self._matching, self._send).run()

    def _send(self, topic: str, user_id: int, value: bytes) -> None:
        self._producer.send(topic, key=str(user_id).encode(), value=value)
        self._producer.flush()

    def _warm(self) -> None:
        self._screen.chapter("The cache warms itself")
        with self._screen.step(
            f"roll {ROLLED_OUT} out to 60 % and read nothing",
            f"{100 * WARM_SHARE:.0f} % of all users are hits within {WARM_TIMEOUT_S:.0f} s",
        ) as step:
            self._client.roll_out(ROLLED_OUT, 60)
            started = time.monotonic()
            # A sample shows when to check all users: checking all of them again and again would be a load of reads,
            # and this step must have none.
            sample = random.Random(1).sample(self._ids, min(5_000, self._users))

            def warm() -> bool:
                return self._inside.hit_share(sample) >= WARM_SHARE and self._inside.hit_share(self._ids) >= WARM_SHARE

            in_time = wait_for(warm, WARM_TIMEOUT_S, poll_s=0.5)
            seconds = time.monotonic() - started
            step.expect(
                in_time, f"{as_percent(self._inside.hit_share(self._ids))} are hits {seconds:.1f} s after the rollout"
            )

    def _delete_segment(self) -> None:
        self._screen.chapter("A segment is deleted for all its users")
        former = list(self._client.export(DELETED))
        with self._screen.step(f"delete {DELETED}", f"taken from its {len(former):,} members") as step:
            removed = self._client.delete(DELETED).removed_count
            step.expect(removed == len(former), f"taken from {removed:,} users")

        with self._screen.step("list the segments", f"{DELETED} is not among them") as step:
            slugs = self._client.list_slugs()
            step.expect(DELETED not in slugs and len(slugs) == len(SEGMENTS) - 1, ", ".join(slugs))

        with self._screen.step("read every former member", f"no user is in {DELETED}") as step:
            started = time.monotonic()
            wrong = 0
            with self._screen.bar("reading", len(former)) as bar:
                for done, (_, slugs_now) in enumerate(self._client.many_user_segments(former), 1):
                    wrong += slugs_now is None or DELETED in slugs_now
                    if done % 10_000 == 0:
                        bar.to(done)
            rate = len(former) / (time.monotonic() - started)
            step.expect(wrong == 0, f"{len(former):,} lists read, {wrong} wrong, {rate:,.0f} users/s")

    def _leave(self) -> None:
        self._screen.chapter("Users leave")
        leaving = self._ids[10 : 10 + min(1000, self._users // 10)]
        with self._screen.step("send delete-user events", f"{len(leaving):,} users NOT_FOUND") as step:
            for user_id in leaving:
                self._producer.send("delete-user", key=str(user_id).encode(), value=b'{"user_id": %d}' % user_id)
            self._producer.flush()

            def gone() -> bool:
                return all(slugs is None for _, slugs in self._client.many_user_segments(leaving))

            wait_for(gone, 60, poll_s=0.2)
            step.expect(
                gone() and self._inside.user_count() == self._users - len(leaving), f"{len(leaving):,} users are gone"
            )

    def _check(self) -> None:
        self._screen.chapter("Everything is computed again, and compared")
        with self._screen.step("segsvc check", "no difference in bits, directory, counters and cache") as step:
            differences, summary = self._inside.check()
            step.expect(differences == 0, summary)


def commands(example_user: int) -> Sequence[str]:
    """Five commands to copy while the stack is up."""
    return (
        "segsvc segments list",
        f"segsvc users segments {example_user}",
        f"segsvc segments rollout {ROLLED_OUT} --percent 75",
        "segsvc operations list",
        "segsvc check",
    )


def failpoint_dir(stack_dir: Path) -> Path:
    """The failpoint folder of the demonstration's stack."""
    return stack_dir / "failpoints"
