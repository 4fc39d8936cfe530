"""A warming process for the benchmarks: it sweeps shards as the warming worker's tasks do.

::

    python -m benchmarks.sweeping                   # the settings come from SEGSVC_ENV_FILE

It says "ready", sweeps all shards once for each line of input, until each is warm, and then says how many entries it
has filled and its CPU time.
"""

from __future__ import annotations

import json
import sys
import time

from benchmarks.reading import NoDispatcher
from segsvc.bootstrap import WorkerServices
from segsvc.config import load_settings
from segsvc.log import configure_logging


def sweep(services: WorkerServices, shards: int) -> int:
    """Run the warmer on each shard, one after the other, until no shard needs it. Returns the entries filled."""
    filled = 0
    while True:
        reports = [services.warming.warm_shard(shard) for shard in range(shards)]
        filled += sum(report.entries for report in reports)
        # A shard that another process sweeps is left to it, and is not warm when this process has nothing to do.
        if not any(report.blocks for report in reports):
            return filled


def main() -> None:
    configure_logging("ERROR", "console")
    settings = load_settings()
    services = WorkerServices(settings, sender=NoDispatcher())
    print("ready", flush=True)
    for _ in sys.stdin:
        cpu_s = time.process_time()
        filled = sweep(services, settings.shard_count)
        print(json.dumps({"entries": filled, "cpu_s": time.process_time() - cpu_s}), flush=True)
    services.close()


if __name__ == "__main__":
    main()
