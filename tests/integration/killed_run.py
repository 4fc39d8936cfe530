"""A test run that test_run_folder.py starts and kills: it starts servers of each kind, reports it, and waits."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from segsvc.local.postgres import PostgresServer
from segsvc.local.redis import RedisServer


def test_that_never_ends(pg_server: PostgresServer, cache_server: RedisServer) -> None:
    pg_server.create_database("one")
    # A child process in a session of its own, unknown to every fixture.
    subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], start_new_session=True)
    Path(tempfile.mkdtemp(prefix="left-")).joinpath("file").touch()
    mount = Path(tempfile.mkdtemp(prefix="mounted-"))
    if shutil.which("mount"):
        subprocess.run(["mount", "-t", "tmpfs", "none", str(mount)], capture_output=True, check=False)
    Path(os.environ["SAY_HERE"]).write_text(tempfile.gettempdir())
    signal.pause()
