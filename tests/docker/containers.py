"""Containers of pytest-celery: our image as its worker, and servers set up as the compose file sets them up."""

from __future__ import annotations

from typing import Any

from pytest_celery import CeleryTestContainer, CeleryTestWorker, CeleryWorkerContainer, RedisContainer

from tests.eventually import eventually

PASSWORD = "of-a-test"
FAILPOINTS = "/tmp/failpoints"


class PostgresContainer(CeleryTestContainer):
    """Databases for ``tests.installation``; reached from here by the published port, in containers by host name."""

    SETTINGS = ("postgres", "-c", "max_prepared_transactions=64", "-c", "max_connections=200")

    def ready(self) -> bool:
        # The server that initialises the folder does not listen on TCP.
        return bool(super().ready() and self.exec_run(["pg_isready", "--host=127.0.0.1"]).exit_code == 0)

    def dsn(self, database: str) -> str:
        host, port = self.get_addr("5432/tcp")
        return f"postgresql+psycopg2://segsvc:{PASSWORD}@{host}:{port}/{database}"

    def inner_dsn(self, database: str) -> str:
        """The DSN with which the workers reach it."""
        return f"postgresql+psycopg2://segsvc:{PASSWORD}@{self.attrs['Config']['Hostname']}:5432/{database}"

    def create_database(self, name: str) -> None:
        done = self.exec_run(["createdb", "--username=segsvc", name])
        assert done.exit_code == 0, done.output


class CacheContainer(RedisContainer):
    """A Redis set up to be the cache."""

    @classmethod
    def command(cls, *args: str, **_: Any) -> list[str]:
        return super().command(*args, "--maxmemory", "100mb", "--maxmemory-policy", "volatile-lru")


class OperationsContainer(CeleryWorkerContainer):
    """``segsvc worker --queue operations`` of our image, with failpoints of its own."""

    @classmethod
    def command(cls, *args: str, **_: Any) -> list[str]:
        return ["worker", "--queue", "operations", *args]

    @classmethod
    def worker_name(cls) -> str:
        return "operations"

    @classmethod
    def worker_queue(cls) -> str:
        return "operations"


class BeatContainer(CeleryTestContainer):
    """``segsvc beat`` of our image."""

    @property
    def ready_prompt(self) -> str:
        return "beat: Starting"


class Worker(CeleryTestWorker):
    """A worker's node; tests can arm its failpoints."""

    def _shell(self, command: str) -> str:
        done = self.container.exec_run(["sh", "-c", command])
        return str(done.output.decode()) if done.exit_code == 0 else ""

    def arm(self, point: str, action: str) -> None:
        """Arm a failpoint. Its folder may exist from before a restart."""
        self._shell(f"mkdir -p {FAILPOINTS} && printf '%s' '{action}' > {FAILPOINTS}/{point}")
        assert self._shell(f"cat {FAILPOINTS}/{point}") == action

    def disarm(self, point: str) -> None:
        self._shell(f"rm -f {FAILPOINTS}/{point}")

    def fired(self, point: str) -> bool:
        return bool(self._shell(f"cat {FAILPOINTS}/{point}.fired"))


def the_one_that_fired(workers: tuple[Worker, Worker], point: str) -> tuple[Worker, Worker]:
    """Wait until a worker has reached the point. Returns that worker, then the other one."""
    eventually(lambda: any(worker.fired(point) for worker in workers), within_s=60)
    one, other = workers
    return (one, other) if one.fired(point) else (other, one)
