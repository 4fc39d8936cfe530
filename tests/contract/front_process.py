"""The front as a process of its own, with a small runner of operations in place of Celery.

Started by conftest.py: ``python front_process.py CONTROL_FOLDER``; the settings come from the environment. While the
file ``broker-down`` is in the folder, the broker is out of reach; a file ``young-s`` holds the bound in seconds within
which a child that ends is not restarted. Threads of this process carry out what is dispatched,
as a worker would.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import UUID

from grpc_api import processes
from grpc_api.server import serve
from segsvc.bootstrap import OperationParts, make_cache
from segsvc.config import Settings, load_settings
from segsvc.domain.errors import LockTimeout, ServiceError, broker_unavailable
from segsvc.domain.operation import Operation, ShardProgress
from segsvc.log import configure_logging, get_logger
from segsvc.postgres.engine import Databases, Pool

log = get_logger(__name__)


class ThreadSender:
    """Carries operations out in this process."""

    def __init__(self, settings: Settings, control: Path) -> None:
        self._control = control
        self._parts = OperationParts(settings, Databases(settings, "runner", Pool(8)), make_cache(settings), self)
        self._threads = ThreadPoolExecutor(8)
        self._closing = threading.Event()
        self._recovery = threading.Thread(target=self._recover)
        self._recovery.start()

    def check(self) -> None:
        """Raises BROKER_UNAVAILABLE while the test demands it."""
        if (self._control / "broker-down").exists():
            raise broker_unavailable()

    def dispatch(self, operation: Operation, shards: Sequence[int]) -> None:
        self.check()
        if self._closing.is_set():
            raise broker_unavailable()
        self._threads.submit(self._run, operation.id, list(shards))

    def _run(self, operation_id: UUID, shards: list[int]) -> None:
        def report(progress: ShardProgress) -> None:
            self._parts.ledger.put_progress(operation_id, progress)

        try:
            for shard in shards:
                self._parts.coordinator.prepare_shard(operation_id, shard, report)
            self._parts.coordinator.finalize(operation_id)
        except (ServiceError, LockTimeout) as error:
            log.warning("runner gave up", operation=str(operation_id), reason=str(error))

    def close(self) -> None:
        """Stop recovery and the threads before the interpreter ends them."""
        self._closing.set()
        self._recovery.join()
        self._threads.shutdown(wait=True)

    def _recover(self) -> None:
        """Do what beat does: continue operations that a failure has left behind."""
        while not self._closing.wait(0.5):
            try:
                self._parts.coordinator.recover()
            except (ServiceError, LockTimeout, OSError) as error:  # the last: no more files can be opened
                log.warning("recovery failed", reason=str(error))


def main() -> int:
    settings = load_settings()
    configure_logging(settings.log_level, settings.log_format)
    control = Path(sys.argv[1])
    if (control / "young-s").exists():
        processes.YOUNG_S = float((control / "young-s").read_text())

    senders: list[ThreadSender] = []

    def make_sender(given: Settings) -> ThreadSender:
        senders.append(ThreadSender(given, control))
        return senders[-1]

    code = serve(settings, make_sender=make_sender)

    for sender in senders:
        sender.close()
    return code


if __name__ == "__main__":
    sys.exit(main())
