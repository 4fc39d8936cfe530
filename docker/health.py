"""Is this container's process well? Exit code 0 if it is. Run by the compose file's health checks.

python docker/health.py front       the front answers its health service
python docker/health.py recovery    recovery has looked at everything lately (of beat)
python docker/health.py PORT        something answers HTTP at /metrics of this port (workers, the bridge)
python docker/health.py PORT/path   the same at another path (Flower)
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


def recovery() -> bool:
    from segsvc.cli import doctor_storage
    from segsvc.config import load_settings

    return not doctor_storage.recovery(load_settings())


def answers(where: str) -> bool:
    port, _, path = where.partition("/")
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{int(port)}/{path or 'metrics'}", timeout=TIMEOUT_S) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


if __name__ == "__main__":
    [what] = sys.argv[1:]
    checks = {"front": front, "recovery": recovery}
    sys.exit(0 if (checks[what]() if what in checks else answers(what)) else 1)
