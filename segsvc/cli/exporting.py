"""Export the members of a segment: a stream that resumes by itself after a broken connection."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TextIO

import grpc
from segmentation.v1 import segments_pb2

from segsvc.cli.base import Refusal, bar, complain
from segsvc.cli.front import Front, connected
from segsvc.config import Settings

_FAILURES_MAX: Final = 3
"""Broken connections in a row, without a page received between them, before an export gives up."""

_FINAL_CODES: Final = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
"""Status codes after which resuming from the same place would be refused again."""


@dataclass(slots=True)
class Export:
    """Where an export goes, and how far it has come.

    Attributes:
        output: the file; None: standard output.
        token: where to resume: everything before it has been written. Empty: the beginning.
    """

    slug: str
    output: Path | None
    token: str
    json_output: bool
    _whole: int = field(default=0, init=False)
    """Bytes of the file that are whole pages, or were there before this export."""

    def run(self, settings: Settings) -> None:
        """Write all members; with a token, those after it.

        Raises:
            Refusal: the front refused, or the connection broke too often. Then, and after an interruption, the command
                that resumes the export has been printed.
        """
        with connected(settings) as front:
            # Before the file is opened: for a segment that does not exist, the file must not be emptied.
            request = segments_pb2.GetSegmentStatisticsRequest(slug=self.slug)
            members = front.segments.GetSegmentStatistics(request, timeout=front.timeout_s).member_count
            with self._opened() as file:
                try:
                    self._write_all(front, file, members)
                except BaseException as error:
                    if self.token and _can_resume(error):
                        complain(f"to go on: {self._command()}")
                    raise

    def _write_all(self, front: Front, file: TextIO, members: int) -> None:
        # No bar where the ids themselves go to the terminal.
        with bar(f"exporting {self.slug}", hidden=file is sys.stdout and file.isatty()) as shown:
            written = 0
            for page in self._pages(front):
                file.write(_text(page, json_output=self.json_output))
                file.flush()
                self.token = page.resume_token
                if self.output is not None:
                    self._whole = file.tell()
                written += len(page.user_ids)
                shown.to(written, max(written, members))

    def _pages(self, front: Front) -> Iterator[segments_pb2.ExportSegmentUsersResponse]:
        """Pages of the stream; it is resumed after a broken connection."""
        failures = 0
        while True:
            # Read again each time: the consumer moves the token when it has written a page.
            request = segments_pb2.ExportSegmentUsersRequest(slug=self.slug, resume_token=self.token)
            try:
                for page in front.segments.ExportSegmentUsers(request):
                    failures = 0
                    yield page
            except grpc.RpcError as error:
                failures += 1
                if error.code() is not grpc.StatusCode.UNAVAILABLE or failures > _FAILURES_MAX:
                    raise
            else:
                return

    @contextlib.contextmanager
    def _opened(self) -> Iterator[TextIO]:
        if self.output is None:
            yield sys.stdout
            return

        try:
            file = self.output.open("a" if self.token else "w")
        except OSError as error:
            raise Refusal(f"{self.output}: {error.strerror}") from error

        self._whole = file.tell()
        try:
            with file:
                yield file
        except BaseException:
            # The file is closed now, so its buffer is written. A page that was written in part is cut off: resuming the
            # export writes it again.
            if self.output.is_file():
                os.truncate(self.output, self._whole)
            raise

    def _command(self) -> str:
        output = "" if self.output is None else f" --output {shlex.quote(str(self.output))}"
        json_output = " --json" if self.json_output else ""
        return f"segsvc segments export {self.slug} --resume-token {self.token}{output}{json_output}"


def _can_resume(error: BaseException) -> bool:
    if isinstance(error, grpc.RpcError):
        return error.code() not in _FINAL_CODES
    # A reader that closes the pipe has what it wanted.
    return not isinstance(error, BrokenPipeError)


def _text(page: segments_pb2.ExportSegmentUsersResponse, *, json_output: bool) -> str:
    if json_output:
        # As with every other --json, 64-bit integers are strings (``front.to_json``).
        return json.dumps({"user_ids": [str(user) for user in page.user_ids], "resume_token": page.resume_token}) + "\n"
    return "".join(f"{user_id}\n" for user_id in page.user_ids)
