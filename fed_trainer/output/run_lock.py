# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""One run at a time writes into a folder."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from transformers.utils import logging

from ..state.processes import first_alone


__all__ = ["HOLDER_NAME", "LOCK_NAME", "FolderInUseError", "owning"]

logger = logging.get_logger(__name__)

LOCK_NAME = ".fed_run.lock"
HOLDER_NAME = ".fed_run.holder"  # a file of its own: Windows lets nobody read one that is locked
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}


class FolderInUseError(RuntimeError):
    """Another run is writing into the folder."""


@contextmanager
def owning(folder: Path) -> Iterator[None]:
    """
    Within, no other trainer, of this process or another, can own `folder`. The lock is the operating system's: it ends
    with its process, however that ends. Of several processes of a launch, which all have to come here, the first holds
    it.

    Raises:
        FolderInUseError: If another one owns it; the message has its host and process.
        OSError: If nothing can be written there.
    """
    held: list[FileLock] = []
    first_alone(lambda: held.extend(_acquired(folder)))
    try:
        yield
    finally:
        for lock in held:
            lock.release()


def _acquired(folder: Path) -> list[FileLock]:
    lock = FileLock(folder / LOCK_NAME, fallback_to_soft=False)  # a soft one would outlive its process
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise FolderInUseError(
            f"`output_dir` {str(folder)!r} is in use by {_holder(folder)}: two runs would write over each other. Wait "
            "until it has ended, stop it, or choose another `output_dir`."
        ) from None
    except OSError as error:
        if error.errno in NO_LOCKS:
            logger.warning(
                f"The file system of {str(folder)!r} has no locks ({error.strerror}), so a second run in this "
                "`output_dir` would not be noticed, and both would write over each other. See that there is none."
            )
            return []
        raise OSError(
            error.errno,
            f"`output_dir` {str(folder)!r} cannot be written to ({error.strerror}). Make it writable, or "
            "choose another one",
        ) from error
    with suppress(OSError):  # a full disk: it is told to others only
        holder = {"host": socket.gethostname(), "pid": os.getpid()}
        (folder / HOLDER_NAME).write_text(json.dumps(holder), encoding="utf-8")
    return [lock]


def _holder(folder: Path) -> str:
    try:
        holder = json.loads((folder / HOLDER_NAME).read_text(encoding="utf-8"))
        host, pid = str(holder["host"]), int(holder["pid"])
    except (OSError, ValueError, TypeError, KeyError):  # it has just begun, or could not write it
        return "another process"
    if (host, pid) == (socket.gethostname(), os.getpid()):
        return f"another trainer of this process ({pid} on {host!r})"
    return f"process {pid} on {host!r}"
