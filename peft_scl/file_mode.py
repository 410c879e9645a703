# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Files that safetensors writes get the mode of others."""

from __future__ import annotations

import os
from pathlib import Path


__all__ = ["follow_umask"]


def follow_umask(path: str | os.PathLike) -> None:
    """
    Give a file that was just written the mode that `open` would have given it.

    `safetensors.save_file` writes a temporary file and renames it, and that has the mode 0600: nobody else could read
    an adapter.
    """
    mask = os.umask(0o077)  # there is no other way to ask; what another thread makes meanwhile is private
    os.umask(mask)
    Path(path).chmod(0o666 & ~mask)
