"""Folders for sockets: their paths are short enough, and other users of the machine cannot enter them."""

from __future__ import annotations

import hashlib
import os
import pwd
import shutil
import stat
import tempfile
from pathlib import Path

from segsvc.local.processes import LocalStackError

# sockaddr_un holds 107 bytes and a terminator on Linux, 103 on macOS.
_SOCKET_PATH_BYTES_MAX = 103


def digest(folder: Path) -> str:
    """A short name for a folder, always the same, to find files elsewhere that belong to it."""
    return hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:12]


def socket_folder(wanted: Path, *, longest_name: str) -> Path:
    """``wanted``, or a folder below the temporary folder if the path of a socket with that name would be too long."""
    if len(os.fsencode(wanted / longest_name)) <= _SOCKET_PATH_BYTES_MAX:
        return wanted
    return Path(tempfile.gettempdir()) / f"segsvc-socket-{digest(wanted)}"


def make_private(folder: Path, *, user: str | None = None) -> None:
    """Make ``folder`` and its parents, for its owner alone: ``user`` (only as root), else this process's user.

    Raises:
        LocalStackError: the folder exists and belongs to another user. /tmp and /var/tmp are open to everyone: a folder
            that another user has put there for us must not be used.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    owners = {os.geteuid(), pwd.getpwnam(user).pw_uid if user else os.geteuid()}
    found = folder.lstat()
    if stat.S_ISLNK(found.st_mode) or found.st_uid not in owners:
        raise LocalStackError(f"{folder} belongs to another user: remove it, or choose another stack folder")
    if user:
        shutil.chown(folder, user, user)
    folder.chmod(0o700)
