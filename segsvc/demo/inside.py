"""Reads of internal state that no client can make: how many users have arrived, and which reads would be hits."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from segsvc.bootstrap import Inspection
from segsvc.config import Settings

_CHUNK = 2000


class Inside:
    def __init__(self, settings: Settings) -> None:
        self._inspection = Inspection(settings)
        self._env_file = settings.stack_dir / "stack.env"

    def close(self) -> None:
        self._inspection.close()

    def user_count(self) -> int:
        """Users on all shards."""
        return self._inspection.user_count()

    def hit_share(self, user_ids: Sequence[int]) -> float:
        """Share of these users that the hot reader would answer from the cache now, 0 to 1."""
        hits = 0
        for first in range(0, len(user_ids), _CHUNK):
            entries = self._inspection.cached(user_ids[first : first + _CHUNK])
            hits += sum(entry is not None for entry in entries)
        return hits / len(user_ids)

    def check(self) -> tuple[int, str]:
        """Run ``segsvc check`` as a user would. Returns the exit code and the last printed line."""
        done = subprocess.run(
            [sys.executable, "-m", "segsvc", "check"],
            # Use the demonstration's own stack, even if the environment names another one.
            env={**os.environ, **({"SEGSVC_ENV_FILE": str(self._env_file)} if self._env_file.exists() else {})},
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )

        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        return done.returncode, lines[-1] if lines else "no output"
