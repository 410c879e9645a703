# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""A record on the disk is whole, whatever happens while it is written."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from fed_trainer.output.record import write_json


OLD, NEW = {"rounds": [1]}, {"rounds": [1, 2]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_json(tmp_path / "federation.json", OLD)
    return tmp_path / "federation.json"


def test_what_is_written_is_read_and_nothing_is_left_beside(path: Path) -> None:
    write_json(path, NEW)
    assert json.loads(path.read_text()) == NEW
    assert [other.name for other in path.parent.iterdir()] == [path.name]


def test_until_it_is_whole_and_on_the_disk_the_old_one_stays(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, synced = os.replace, []

    def watched(source: Path, target: Path) -> None:
        assert json.loads(path.read_text()) == OLD
        assert json.loads(Path(source).read_text()) == NEW
        assert os.stat(source).st_ino in synced, "a rename may reach the disk before the content"
        assert Path(source).parent == path.parent, "renaming would be copying"
        replace(source, target)
        synced.clear()

    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(os, "replace", watched)
    write_json(path, NEW)
    assert json.loads(path.read_text()) == NEW
    assert os.stat(path.parent).st_ino in synced, "nor is a new name on the disk before its folder is"


@pytest.mark.parametrize("broken", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_one_and_is_told_in_a_sentence(
    path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def refuses(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if broken == "write":
        monkeypatch.setattr(Path, "write_text", refuses)
    else:
        monkeypatch.setattr(os, broken, refuses)
    with pytest.raises(
        OSError, match=r"federation.json could not be written \(.*No space left on device.*make room"
    ) as error:
        write_json(path, NEW)
    assert error.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert json.loads(path.read_text()) == OLD
