"""Limits of an event; see ``docs/events.md``."""

from __future__ import annotations

import re
from typing import Final

EVENT_BYTES_MAX: Final = 64 * 1024
DEPTH_MAX: Final = 8
"""Levels of objects and arrays; the event itself is the first."""
ATTRIBUTES_MAX: Final = 64
ATTRIBUTES_BYTES_MAX: Final = 8 * 1024
STRING_BYTES_MAX: Final = 256
LIST_MAX: Final = 64
INT_MIN: Final = -(2**63)
INT_MAX: Final = 2**63 - 1

ATTRIBUTE_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
