# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What leaves a client is written down on the client, so that a data-protection officer can read it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..output.disk import sync


__all__ = ["SENT_NAME", "SentLog"]

SENT_NAME = "sent.jsonl"


class SentLog:
    """
    A file with a line of JSON for each message that leaves. A line is on the disk before its message is sent, so
    nothing leaves that is not in it. Of a process that dies in between, the last line may be of a message that has
    not left; one that is cut off is always such a line. Nothing is ever taken out of it.

    Args:
        path (`str` or `os.PathLike`):
            The file; it and its folder are made if they are not there.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self._path = Path(path)

    def write(self, about: Mapping[str, Any]) -> None:
        """
        Write a line, which begins with the time.

        Args:
            about (`Mapping[str, Any]`):
                What leaves, as JSON has it.

        Raises:
            OSError: If it cannot be written; then nothing may leave.
        """
        time = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = json.dumps({"time": time, **about}, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            self._append(line.encode("utf-8", "backslashreplace"))
        except OSError as error:
            told = OSError(
                f"{str(self._path)!r}, the log of what leaves this client, could not be written "
                f"({error.strerror or error}), so nothing was sent. Make room, or see to the disk, and join again."
            )
            told.errno = error.errno
            raise told from error

    def _append(self, line: bytes) -> None:
        is_new = not self._path.exists()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "ab+", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if size > 0:
                file.seek(size - 1)
                if file.read(1) != b"\n":  # of a line that was cut off
                    line = b"\n" + line
            written = file.write(line)
            if written != len(line):
                raise OSError(errno.ENOSPC, "only a part of a line could be written")
        sync(self._path)
        if is_new:
            sync(self._path.parent)
