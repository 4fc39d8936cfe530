"""Each dependency is killed and started again: calls that need it are refused with the reason, all else goes on, and
full service returns without a restart of our processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import grpc
import psutil
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from segsvc.config import Settings
from segsvc.demo.client import Client
from segsvc.local.postgres import PostgresServer
from segsvc.local.redis import BROKER_CONFIG, CACHE_CONFIG, RedisServer
from segsvc.local.stack import LocalStack
from tests.e2e.events import all_readable, producer
from tests.eventually import eventually

USERS = list(range(7_000_001, 7_000_401))
SLUG = "outages"


def reason_of(error: grpc.RpcError) -> str:
    """The reason in an error's details."""
    assert isinstance(error, grpc.Call)
    status = rpc_status.from_call(error)
    assert status is not None, error
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in status.details)
    assert info.domain == "segsvc"
    return info.reason


def refusal(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    """Code and reason with which a call is refused."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert isinstance(caught.value, grpc.Call)
    return caught.value.code(), reason_of(caught.value)


@pytest.fixture(scope="module", autouse=True)
def segment_with_users(stack: LocalStack) -> None:
    settings = stack.settings
    client = Client.of(settings)
    client.wait_ready(30)
    with producer(settings) as send:
        send("create-user", ({"user_id": user, "attributes": {"country": "KZ"}} for user in USERS))
    eventually(lambda: all_readable(client, USERS))
    client.create(SLUG, "")
    client.roll_out(SLUG, 40)
    client.close()


def redis_of(stack: LocalStack, name: str) -> RedisServer:
    """The running server of the stack, to be killed and started again at the same address."""
    config, url = {
        "cache": (CACHE_CONFIG, stack.settings.cache_url),
        "broker": (BROKER_CONFIG, stack.settings.broker_url),
    }[name]
    address = urlsplit(url)
    return RedisServer(
        name, stack.home / name, config, password=address.password, port=address.port or 0, mark=stack.home
    )


def memberships(client: Client) -> dict[int, list[str] | None]:
    return dict(client.many_user_segments(USERS))


def test_the_cache_down_and_back(client: Client, stack: LocalStack, settings: Settings) -> None:
    before = memberships(client)

    cache = redis_of(stack, "cache")
    cache.kill()
    try:
        assert memberships(client) == before  # from the shards
        with producer(settings) as send:
            send("create-user", [{"user_id": 7_100_001, "attributes": {}}])
            send("delete-user", [{"user_id": USERS[-1]}])
        # A creation needs no cache; a deletion waits for it.
        eventually(lambda: all_readable(client, [7_100_001]))
    finally:
        cache.start()

    del before[USERS[-1]]
    eventually(lambda: client.many_user_segments([USERS[-1]]).__next__()[1] is None)
    client.roll_out(SLUG, 41)
    now = memberships(client)
    assert all(set(slugs or ()) <= set(now[user] or ()) for user, slugs in before.items())


def test_postgres_down_and_back(client: Client, stack: LocalStack) -> None:
    users = USERS[:-1]
    before = dict(client.many_user_segments(users))  # cached from here on

    server = PostgresServer(stack.home / "postgres", mark=stack.home)
    server.kill()
    try:
        assert dict(client.many_user_segments(users)) == before  # hits need no shard
        started = time.monotonic()
        assert refusal(lambda: client.user_segments(6_999_999)) == (
            grpc.StatusCode.UNAVAILABLE,
            "SHARD_UNAVAILABLE",
        )
        assert refusal(client.list_slugs) == (grpc.StatusCode.UNAVAILABLE, "CATALOG_UNAVAILABLE")
        assert refusal(lambda: client.roll_out(SLUG, 42)) == (grpc.StatusCode.UNAVAILABLE, "CATALOG_UNAVAILABLE")
        assert time.monotonic() - started < 15
    finally:
        server.start()

    eventually(lambda: not _fails(client.list_slugs))
    client.roll_out(SLUG, 43)
    assert refusal(lambda: client.user_segments(6_999_999))[1] == "USER_NOT_FOUND"


def test_the_broker_down_and_back(client: Client, stack: LocalStack, settings: Settings) -> None:
    broker = redis_of(stack, "broker")
    broker.kill()

    try:
        assert refusal(lambda: client.roll_out(SLUG, 44)) == (grpc.StatusCode.UNAVAILABLE, "BROKER_UNAVAILABLE")
        assert SLUG in client.list_slugs()
        client.create("without-broker", "")  # carried out by the front itself
        with producer(settings) as send:
            send("create-user", [{"user_id": 7_100_002, "attributes": {}}])
    finally:
        broker.start()

    eventually(lambda: all_readable(client, [7_100_002]), within_s=90)
    assert client.roll_out(SLUG, 45).added_count >= 0
    client.delete("without-broker")


def test_every_worker_of_operations_killed_at_once(client: Client, stack: LocalStack) -> None:
    point = stack.home / "failpoints" / "prepared-not-voted"
    fired = point.with_suffix(".fired")
    fired.unlink(missing_ok=True)
    point.write_text("hold shard=2")

    try:
        name = client.start_roll_out(SLUG, 60)
        eventually(fired.exists)
        [main] = [part.pid for part in stack.status() if part.name == "worker-operations"]
        assert main is not None
        os.killpg(os.getpgid(main), signal.SIGKILL)
    finally:
        point.unlink()

    last = list(client.watch(name))[-1]
    # On a busy machine the restart takes time: the rollout is done in time, or the deadline aborts it.
    assert last.State.Name(last.state) in ("DONE", "ABORTED")

    members = set(client.export(SLUG))
    assert client.statistics(SLUG).member_count == len(members)
    for user, slugs in memberships(client).items():
        if slugs is not None:  # None: deleted by an earlier test
            assert (SLUG in slugs) == (user in members), user
    client.roll_out(SLUG, 61)


def _fails(call: Callable[[], object]) -> bool:
    try:
        call()
    except grpc.RpcError:
        return True
    return False


def test_only_the_warmer_gives_way_to_other_processes(stack: LocalStack) -> None:
    nice = {part.name: psutil.Process(part.pid).nice() for part in stack.status() if part.pid is not None}
    [warmer] = [name for name in nice if name == "worker-warming"]
    assert nice.pop(warmer) > max(nice.values())
