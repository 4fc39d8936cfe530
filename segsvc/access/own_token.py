"""The token that this process sends to a front: of ``SEGSVC_TOKEN``, or of the file in ``SEGSVC_TOKEN_FILE``."""

from __future__ import annotations

import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final

from segsvc.config import Settings

_TOKEN: Final = re.compile(r"[\x21-\x7e]{1,8192}")
"""What can be sent: gRPC shows a value that it cannot send in its error."""


class TokenError(Exception):
    """The token cannot be read or sent. The text says where it is, and shows nothing of it."""


def own_token(settings: Settings, warn: Callable[[str], None]) -> str:
    """The token to send; empty: none.

    Args:
        warn: called with a sentence if other users of the machine can read the file.

    Raises:
        TokenError: there is no such file, or it holds no token.
    """
    if settings.token:
        return _checked("SEGSVC_TOKEN", settings.token.strip())
    if settings.token_file is None:
        return ""

    path = settings.token_file
    where = f"SEGSVC_TOKEN_FILE: {path}"
    try:
        text = path.read_text()
        mode = path.stat().st_mode
    except OSError as error:
        raise TokenError(f"{where}: {error.strerror}") from None
    except UnicodeDecodeError:
        text, mode = "", 0
    if mode & stat.S_IROTH:
        warn(f"{where} can be read by every user of this machine; chmod 600 {_quoted(path)}")
    return _checked(where, text.strip())


def _checked(where: str, token: str) -> str:
    """Raises TokenError."""
    if not _TOKEN.fullmatch(token):
        raise TokenError(f"{where}: a token is 1 to 8192 printable ASCII characters without blanks")
    return token


def _quoted(path: Path) -> str:
    return f"'{path}'" if re.search(r"\s", str(path)) else str(path)
