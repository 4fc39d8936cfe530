"""Files that are read again when they change. If the new contents are broken, the old ones stay in force."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final, Generic, TypeVar

from segsvc import metrics
from segsvc.log import get_logger

T = TypeVar("T")

FILE_BYTES_MAX: Final = 16 << 20
"""A larger file is a mistake; reading it would take memory that calls need."""

log = get_logger(__name__)

_Version = tuple[int, int, int, int] | None
"""What differs after each change of a file, also if a link was turned to another file. None: there is no such file."""


class AccessFileError(Exception):
    """A file cannot be used. The text names the file and what is wrong with it, and shows nothing of its contents."""


class WatchedFile(Generic[T]):
    """The parsed contents of one file.

    Args:
        setting: the variable that names the file, for messages and for the metric.
        parse: makes the contents from bytes. Raises AccessFileError without the file's name.

    Raises:
        AccessFileError: the file cannot be read or parsed. A process does not start with a broken file.
    """

    def __init__(self, setting: str, path: Path, parse: Callable[[bytes], T]) -> None:
        self._setting = setting
        self._path = path
        self._parse = parse
        self._seen = _version(path)
        self.contents: T = self._read()
        self._broken = metrics.access_file_broken.labels(setting)
        self._broken.set(0)

    def look(self) -> None:
        """Read the file again if it has changed. For one thread alone; ``contents`` may be read from any thread."""
        version = _version(self._path)
        if version == self._seen:
            return
        # Noted before the file is read: a change during the reading is then seen by the next look.
        self._seen = version

        try:
            contents = self._read()
        except AccessFileError as error:
            self._broken.set(1)
            # Without a traceback: the reason says all.
            log.error(  # noqa: TRY400
                "access_file_broken", reason=str(error), effect="the contents before stay in force"
            )
            return
        self.contents = contents
        self._broken.set(0)
        log.warning("access_file_changed", setting=self._setting, file=str(self._path))

    def _read(self) -> T:
        return read_file(self._setting, self._path, self._parse)


def read_file(setting: str, path: Path, parse: Callable[[bytes], T]) -> T:
    """Read and parse a file once. Raises AccessFileError."""
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise AccessFileError(f"{setting}: {path}: {error.strerror}") from None
    if len(data) > FILE_BYTES_MAX:
        raise AccessFileError(f"{setting}: {path}: is larger than {FILE_BYTES_MAX >> 20} MiB")
    try:
        return parse(data)
    except AccessFileError as error:
        raise AccessFileError(f"{setting}: {path}: {error}") from None


def _version(path: Path) -> _Version:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
