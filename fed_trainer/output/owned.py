# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Which folders are a run's own, and all that a run deletes: what it has marked, or has listed as written by it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath


__all__ = ["MARKER", "is_own", "make_own", "remove_own_files", "remove_own_folder", "stays_inside", "unmark"]

MARKER = ".fed_run"
EXPLANATION = "A run of peft-scl has made this folder, and removes what it has written here.\n"


def make_own(folder: Path) -> None:
    """Make a folder, if it is not there, and mark it; one with foreign content must not be given."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text(EXPLANATION, encoding="utf-8")


def is_own(folder: Path) -> bool:
    """Whether a run has made the folder: it is marked, or is still empty because the run died before it could."""
    return folder.is_dir() and not folder.is_symlink() and ((folder / MARKER).is_file() or not any(folder.iterdir()))


def unmark(folder: Path) -> None:
    """From now on the folder is the user's."""
    (folder / MARKER).unlink()


def remove_own_folder(folder: Path) -> None:
    """
    Delete a marked folder with all that is in it; nothing if there is none.

    Raises:
        FileExistsError: If it is not marked.
    """
    if not os.path.lexists(folder):
        return
    if not is_own(folder):
        raise FileExistsError(
            f"{str(folder)!r} is in the way: a run writes a folder of that name, but this one was made by something "
            "else, or by an earlier version. Move it away."
        )
    shutil.rmtree(folder)


def remove_own_files(folder: Path, names: Iterable[str]) -> list[str]:
    """
    Delete files of `folder` that a run has written, and then the folders that are empty.

    Args:
        folder (`Path`):
            The folder.
        names (`Iterable[str]`):
            Paths within it, with `/`; those that are not there are passed over.

    Returns:
        `list[str]`: What is left in the folder, as it was not in `names`.
    """
    parents = {folder}
    for name in names:
        path = folder / name
        if stays_inside(name) and (path.is_file() or path.is_symlink()):
            path.unlink()
            parents.add(path.parent)
    for parent in sorted(parents, key=lambda path: len(path.parts), reverse=True):  # the deepest first
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def stays_inside(name: str) -> bool:
    """Whether a path within a folder leads to something in it."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\\" not in name
