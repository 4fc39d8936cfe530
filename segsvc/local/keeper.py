"""Keeps the servers of a stack alive: starts a server again that has ended by itself, with its data and its address.

    python -m segsvc.local.keeper HOME JARS [--fast]

supervisord runs it beside our own processes. The servers are not supervisord's own children because they are started in
order, with steps between (initdb, Kafka's storage, stale locks), and because tests stop and restart them one by one. A
server whose pid file was removed is down on purpose, and stays down.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from segsvc.config import load_settings
from segsvc.local.processes import LocalStackError
from segsvc.local.servers import Servers
from segsvc.log import configure_logging, get_logger

log = get_logger(__name__)

CHECK_EVERY_S = 1.0
RETRY_AFTER_S = 10.0
"""A server that does not start is tried again after this time: its disk may be full for a while."""


def keep_running(home: Path, jars: Path, *, fast: bool) -> None:
    """Start the servers of a stack again whenever they end, until this process ends."""
    while True:
        pause_s = CHECK_EVERY_S
        try:
            # A new object each time: ``up`` may have given a server another port.
            for name in Servers(home, jars=jars, fast=fast).revive():
                log.warning("server_started_again", server=name)
        except LocalStackError as error:
            log.warning("server_does_not_start", problem=str(error))
            pause_s = RETRY_AFTER_S
        time.sleep(pause_s)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("home", type=Path)
    parser.add_argument("jars", type=Path)
    parser.add_argument("--fast", action="store_true")
    given = parser.parse_args()
    settings = load_settings()
    configure_logging(settings.log_level, settings.log_format)
    keep_running(given.home, given.jars, fast=given.fast)
