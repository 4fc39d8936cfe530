"""New users while the conditions of live rules cost as much as is allowed, on one shard."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence

import grpc

from benchmarks.harness import Result, Sample, benchmark, spread_of, value_at_least
from benchmarks.suite.ingest import Loader, Ours
from benchmarks.world import World
from segsvc.bootstrap import make_rule_costs
from segsvc.config import Settings
from segsvc.demo.client import Client
from segsvc.demo.people import event
from segsvc.postgres.engine import Databases

USERS = 20_000
"""New users in one round."""
ROUNDS = 5
ALONE, TOGETHER = 0.9, 0.9
"""How much of its bound a condition is made to cost, and all conditions: a measurement varies by a few percent."""
TEXT = "x" * 256
"""An attribute as large as strings are when a condition's cost is measured: each user has one."""
PROBE = 40
"""Comparisons of the condition whose cost tells what one comparison costs."""


def _condition(first: int, comparisons: int) -> str:
    """A condition that no user meets, so that each comparison is made."""
    return " || ".join(f'user.text.contains("q{first + n}")' for n in range(comparisons))


def conditions_at_the_bound(settings: Settings) -> list[str]:
    """Conditions of which each costs nearly what one may, and all together nearly what all may."""
    databases = Databases(settings, "bench")
    try:
        costs = make_rule_costs(settings, databases)
        each_us = costs.measured(_condition(0, PROBE), timeout_s=None).alone_us / PROBE
    finally:
        databases.close()

    largest = int(ALONE * settings.condition_cost_max_us / each_us)
    left = int(TOGETHER * settings.conditions_cost_max_us / each_us)
    made: list[str] = []
    while left > 0:
        made.append(_condition(10_000 * (len(made) + 1), min(left, largest)))
        left -= largest
    return made


@benchmark("rules")
def rules(world: World) -> Iterator[Result]:
    """create-user events from Kafka to readable over gRPC, one shard, conditions at the bounds of their cost."""
    with world.stack(shards=1, cache_warm_budget_bytes=0) as stack:
        ours, loader = Ours(stack), Loader(stack.settings.kafka_bootstrap_servers)
        client = Client.of(stack.settings)
        users = itertools.count(1)

        def new_users() -> Sample:
            return ours.measure(loader, [(n, event(n, {"text": TEXT})) for n in itertools.islice(users, USERS)])

        new_users()  # users to measure costs with; this round does not count
        without = [new_users() for _ in range(ROUNDS)]

        accepted = 0
        for number, condition in enumerate(conditions_at_the_bound(stack.settings)):
            client.create(f"costly-{number}", "")
            try:
                client.roll_out(f"costly-{number}", 50, condition)
            except grpc.RpcError:
                break  # it was the last one, and the sum is just above the bound
            accepted += 1
        rates = [new_users() for _ in range(ROUNDS)]
        client.close()

    values, reference_values = [sample.value for sample in rates], [sample.value for sample in without]
    value, reference = statistics.median(values), statistics.median(reference_values)
    yield Result(
        "rules", value, "users/s", reference, value / reference, value_at_least(5000),
        spread=spread_of(values), reference_spread=spread_of(reference_values),
        cpu_us_per_call=_cpu_us(rates), reference_cpu_us_per_call=_cpu_us(without),
        note=f"one shard; {accepted} conditions that cost nearly what is allowed; the reference: the same without them",
        more={"rounds": values, "reference_rounds": reference_values},
    )  # fmt: skip


def _cpu_us(samples: Sequence[Sample]) -> dict[str, float]:
    """CPU time of each process for a user, over all rounds."""
    users = sum(sample.calls for sample in samples)
    names = samples[0].cpu_s
    return {name: sum(sample.cpu_s[name] for sample in samples) / users * 1e6 for name in names}
