# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Files of a model: written beside, looked at, moved into place, so that a folder's own files are told from what the run
wrote.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from peft_scl.file_mode import follow_umask
from peft_scl.foreign_files import read_shapes

from .digests import read_digests
from .disk import DamagedFileError, file_digest
from .owned import MARKER, make_own, remove_own_files, remove_own_folder


__all__ = ["MODEL_WEIGHTS", "fresh_folder", "move_into_place", "raise_contents", "remove_superseded", "saved_shapes"]

MODEL_WEIGHTS = "model.safetensors"


@contextmanager
def fresh_folder(folder: Path) -> Iterator[Path]:
    """
    A hidden folder within `folder`, on the same file system; removed at the end, or the next time, with what is left
    in it.
    """
    beside = folder / ".saving"
    remove_own_folder(beside)  # of a run that died here before
    make_own(beside)
    try:
        yield beside
    finally:
        remove_own_folder(beside)


def raise_contents(folder: Path, name: str) -> None:
    """Move what is in `folder/name`, where PEFT saves an adapter that is not called `default`, up into `folder`."""
    below = folder / name
    for path in list(below.iterdir()):
        os.replace(path, folder / path.name)
    below.rmdir()


def saved_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors in the safetensors files of `folder`, read from their headers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        shapes |= read_shapes(path)
    return shapes


def move_into_place(beside: Path, folder: Path) -> list[str]:
    """
    Move the files of `beside` to the same places in `folder`, the weights last.

    Returns:
        `list[str]`: Their paths within `folder`, sorted.
    """
    names = [path.relative_to(beside).as_posix() for path in beside.rglob("*") if path.is_file()]
    names.remove(MARKER)
    for name in sorted(names, key=lambda name: (".safetensors" in name, name)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            follow_umask(beside / name)
        os.replace(beside / name, folder / name)
    return sorted(names)


def remove_superseded(folder: Path, names: Sequence[str]) -> None:
    """
    Remove what an earlier save has written into `folder` and the present one, of `names`, has not: weights of another
    sharding would be loaded in place of the new ones. A file that is no longer what was written is somebody else's and
    stays.
    """
    try:
        earlier = read_digests(folder)
    except DamagedFileError:  # there is none, or it is not ours
        return
    gone = earlier.keys() - set(names)
    ours = [name for name in gone if (folder / name).is_file() and file_digest(folder / name) == earlier[name]]
    remove_own_files(folder, ours)
