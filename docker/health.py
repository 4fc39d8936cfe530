"""Check the health of this container's process; exit code 0 if it works. The compose file's health checks run it.

python docker/health.py front       the front answers its health service
python docker/health.py PORT        the process that serves metrics at this port says at /health that it works
python docker/health.py PORT/path   a server answers HTTP at another path (Flower)
"""

from __future__ import annotations

import sys
import urllib.error
import urllib.request

TIMEOUT_S = 3.0


def front() -> bool:
    from segsvc.cli.front import is_serving
    from segsvc.config import load_settings

    return is_serving(load_settings())


def answers(where: str) -> bool:
    port, _, path = where.partition("/")
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{int(port)}/{path or 'health'}", timeout=TIMEOUT_S) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


if __name__ == "__main__":
    [what] = sys.argv[1:]
    sys.exit(0 if (front() if what == "front" else answers(what)) else 1)
