"""``segsvc segments export``: cut, refused, interrupted, and continued."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from segmentation.v1 import segments_pb2

from segsvc.cli import exporting
from tests.unit.canned_front import CannedFront, give_statistics, refuse, run


class CutExport:
    """Three pages; the stream is cut after the second page, ``cuts`` times."""

    PAGES = ((1, 2), (3, 4), (5,))

    def __init__(self, cuts: int) -> None:
        self.cuts = cuts

    def __call__(self, request: segments_pb2.ExportSegmentUsersRequest, context: grpc.ServicerContext) -> Iterator[Any]:
        for number in range(int(request.resume_token or 0), len(self.PAGES)):
            if number == 2 and self.cuts:
                self.cuts -= 1
                context.abort(grpc.StatusCode.UNAVAILABLE, "going away")
            yield segments_pb2.ExportSegmentUsersResponse(user_ids=self.PAGES[number], resume_token=str(number + 1))


EXPORT = "/segmentation.v1.SegmentService/ExportSegmentUsers"


def test_an_export_goes_on_after_a_cut(front: CannedFront, tmp_path: Path) -> None:
    give_statistics(front)
    front.on(EXPORT, segments_pb2.ExportSegmentUsersRequest, CutExport(2), stream=True)
    result = run("segments", "export", "checkout")
    assert (result.exit_code, result.stdout) == (0, "1\n2\n3\n4\n5\n")
    file = tmp_path / "members"
    assert run("segments", "export", "checkout", "--output", str(file)).exit_code == 0
    assert file.read_text() == "1\n2\n3\n4\n5\n"
    lines = run("segments", "export", "checkout", "--json").stdout.splitlines()
    assert json.loads(lines[1]) == {"user_ids": ["3", "4"], "resume_token": "2"}


def test_an_export_that_is_cut_for_good_says_how_to_go_on(front: CannedFront, tmp_path: Path) -> None:
    give_statistics(front)
    cut = CutExport(100)
    front.on(EXPORT, segments_pb2.ExportSegmentUsersRequest, cut, stream=True)
    file = tmp_path / "members"

    result = run("segments", "export", "checkout", "--output", str(file))
    assert result.exit_code == 1
    assert result.stderr.splitlines()[0] == (
        f"to go on: segsvc segments export checkout --resume-token 2 --output {file}"
    )

    cut.cuts = 0
    again = run("segments", "export", "checkout", "--output", str(file), "--resume-token", "2")
    assert again.exit_code == 0
    assert file.read_text() == "1\n2\n3\n4\n5\n"


def test_a_page_that_cannot_be_written_whole_is_taken_back(
    front: CannedFront, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_statistics(front)
    front.on(EXPORT, segments_pb2.ExportSegmentUsersRequest, CutExport(0), stream=True)
    file = tmp_path / "members"
    text = exporting._text

    def full(page: segments_pb2.ExportSegmentUsersResponse, *, json_output: bool) -> str:
        """The disk is full after half of the second page."""
        whole = text(page, json_output=json_output)
        if page.resume_token == "2":
            with file.open("a") as half:
                half.write(whole[:2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole

    monkeypatch.setattr(exporting, "_text", full)
    result = run("segments", "export", "checkout", "--output", str(file))
    assert result.exit_code == 1
    assert file.read_text() == "1\n2\n"
    hint, why = result.stderr.splitlines()
    assert why == "cannot write: No space left on device"

    monkeypatch.setattr(exporting, "_text", text)
    assert run(*hint.removeprefix("to go on: segsvc ").split()).exit_code == 0
    assert file.read_text() == "1\n2\n3\n4\n5\n"


def test_an_export_that_is_refused_touches_no_file(front: CannedFront, tmp_path: Path) -> None:
    missing = refuse(grpc.StatusCode.NOT_FOUND, "SEGMENT_NOT_FOUND", "there is no segment 'x'")
    front.on("/segmentation.v1.SegmentService/GetSegmentStatistics", segments_pb2.GetSegmentStatisticsRequest, missing)
    file = tmp_path / "members"
    file.write_text("1\n")
    result = run("segments", "export", "x", "--output", str(file))
    assert (result.exit_code, result.stderr) == (1, "SEGMENT_NOT_FOUND: there is no segment 'x'\n")
    assert file.read_text() == "1\n"


def test_a_place_that_is_refused_is_not_recommended(front: CannedFront) -> None:
    give_statistics(front)
    wrong = refuse(grpc.StatusCode.INVALID_ARGUMENT, "PAGE_TOKEN_INVALID", "resume_token: is not a token")
    front.on(EXPORT, segments_pb2.ExportSegmentUsersRequest, wrong, stream=True)
    result = run("segments", "export", "checkout", "--resume-token", "x")
    assert (result.exit_code, result.stderr) == (1, "PAGE_TOKEN_INVALID: resume_token: is not a token\n")
