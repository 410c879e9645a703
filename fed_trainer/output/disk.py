# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Files that survive a loss of power, and errors of the disk in sentences."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


__all__ = ["DamagedFileError", "file_digest", "reading", "replace_durably", "sync", "writing"]

# what reading a file raises that is not what was written: gone, unreadable, cut off, or something else in its place
UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError)


class DamagedFileError(ValueError):
    """A file that a result depends on is not what was written."""


def file_digest(path: str | os.PathLike, durably: bool = False) -> str:
    """The SHA-256 of a file; `durably` waits until it is on the disk."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    if durably:
        sync(path)
    return digest.hexdigest()


def sync(path: str | os.PathLike) -> None:
    """
    Wait until a file, or the names in a folder, are on the disk. Nothing outside POSIX, where folders cannot be
    opened.
    """
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_durably(beside: Path, path: Path) -> None:
    """
    Rename `beside`, a file or a folder whose files are on the disk, to `path`, so that after a crash there is one or
    the other.
    """
    sync(beside)
    os.replace(beside, path)
    sync(path.parent)


@contextmanager
def reading(name: str) -> Iterator[None]:
    """
    Within, what cannot be read or parsed is damage.

    Raises:
        DamagedFileError: Naming the file, and the error by its class.
    """
    try:
        yield
    except DamagedFileError:
        raise
    except UNREADABLE as error:
        cause = error.__cause__ or error  # what `foreign_files` has put into a sentence
        raise DamagedFileError(f"{name} cannot be read ({type(cause).__name__})") from error


@contextmanager
def writing(what: str) -> Iterator[None]:
    """
    Within, an error of the disk is raised as a sentence.

    Args:
        what (`str`):
            What is written, as the subject of "could not be written".

    Raises:
        OSError: With the number of the original one.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:  # the second is that of a full disk under safetensors
        if isinstance(error.__cause__, (OSError, SafetensorError)):  # it is in a sentence already
            raise
        told = OSError(
            f"{what} could not be written ({error}). The checkpoints that were written before are whole: make room, "
            "or see to the disk, and continue with `train(resume_from_checkpoint=True)`."
        )
        told.errno = getattr(error, "errno", None)
        raise told from error
