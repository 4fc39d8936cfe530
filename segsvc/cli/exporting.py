"""Exporting the members of a segment: a stream that goes on by itself after a cut."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final, TextIO

import grpc
from segmentation.v1 import segments_pb2

from segsvc.cli.base import Refusal, bar, complain
from segsvc.cli.front import TIMEOUT_S, Front, connected
from segsvc.config import Settings

_CUTS_MAX: Final = 3
"""Cuts in a row, nothing received between them, before an export gives up."""


def export_members(settings: Settings, slug: str, output: Path | None, resume_token: str, *, json_output: bool) -> None:
    """Write all members of a segment to a file or to standard output.

    Raises:
        Refusal: the export was refused, or cut off too often; the text then has the token to go on with.
    """
    with connected(settings) as front:
        members = front.segments.GetSegmentStatistics(
            segments_pb2.GetSegmentStatisticsRequest(slug=slug), timeout=TIMEOUT_S
        ).member_count
        with (
            # Only now: what the file held is not lost to a slug that is misspelt.
            _opened(output, append=bool(resume_token)) as file,
            # The ids themselves on a terminal leave no place for a bar.
            bar(f"exporting {slug}", hidden=file is sys.stdout and file.isatty()) as shown,
        ):
            written = 0
            for page in _pages(front, slug, resume_token):
                if json_output:
                    line = {"user_ids": list(page.user_ids), "resume_token": page.resume_token}
                    file.write(json.dumps(line) + "\n")
                else:
                    file.writelines(f"{user_id}\n" for user_id in page.user_ids)
                written += len(page.user_ids)
                shown.to(written, max(written, members))


@contextlib.contextmanager
def _opened(output: Path | None, *, append: bool) -> Iterator[TextIO]:
    if output is None:
        yield sys.stdout
        return
    try:
        file = output.open("a" if append else "w")
    except OSError as error:
        raise Refusal(f"{output}: {error.strerror}") from error
    with file:
        yield file


def _pages(front: Front, slug: str, token: str) -> Iterator[segments_pb2.ExportSegmentUsersResponse]:
    """Pages of the stream, resumed after a cut."""
    cuts = 0
    while True:
        request = segments_pb2.ExportSegmentUsersRequest(slug=slug, resume_token=token)
        try:
            for page in front.segments.ExportSegmentUsers(request):
                cuts = 0
                # Only then is it the place to go on from: the consumer has written the page when it asks for the next.
                yield page
                token = page.resume_token
        except grpc.RpcError as error:
            cuts += 1
            if error.code() is not grpc.StatusCode.UNAVAILABLE or cuts > _CUTS_MAX:
                if token:
                    complain(f"go on with: segsvc segments export {slug} --resume-token {token}")
                raise
        else:
            return
