"""Which folder of a stack the demonstration takes, and which one it leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from segsvc.demo import run
from segsvc.local.processes import LocalStackError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A stack's folder with data in it."""
    made = tmp_path / "stack"
    (made / "postgres").mkdir(parents=True)
    return made


def test_a_stack_that_was_kept_is_left_alone(folder: Path) -> None:
    with pytest.raises(LocalStackError, match=r"holds a stack with data.*REPLACE=1 make demo"):
        run._take_folder(folder, replace=False)
    assert (folder / "postgres").exists()


def test_a_stack_is_replaced_where_that_is_asked_for(folder: Path) -> None:
    run._take_folder(folder, replace=True)
    assert not folder.exists()


def test_what_a_killed_demonstration_left_is_deleted(folder: Path) -> None:
    with run._marked(folder):
        pass
    run._take_folder(folder, replace=False)
    assert not folder.exists()


@pytest.mark.parametrize("replace", [False, True])
def test_a_running_demonstration_is_left_alone(folder: Path, replace: bool) -> None:
    with run._marked(folder), pytest.raises(LocalStackError, match="another demonstration runs"):
        run._take_folder(folder, replace=replace)
    assert (folder / "postgres").exists()
