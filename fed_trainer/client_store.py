# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What clients keep from round to round, on disk: memory does not grow with the number of clients."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from urllib.parse import quote

from safetensors.torch import load_file, save_file

from .adapter_state import AdapterState


__all__ = ["ClientStore"]

LONGEST_NAME = 120
PENDING = ".new"


class ClientStore:
    """
    One safetensors file per client. A file is written beside and renamed at the end of the round, and never changed afterwards:
    a round that breaks off leaves all clients as they were, and checkpoints hold hard links instead of copies.

    Args:
        folder (`Path`):
            Where the files are; made at the first `write`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, client: str) -> dict[str, AdapterState]:
        """What the client has kept, by part; empty for a client that has kept nothing."""
        path = self._path(client)
        parts: dict[str, AdapterState] = {}
        if path.is_file():
            # into memory of its own: a memory map, the default, keeps some bytes per tensor for good (safetensors 0.8.0)
            for entry, tensor in load_file(path, backend="pread").items():
                part, _, key = entry.partition("/")
                parts.setdefault(part, {})[key] = tensor
        return parts

    def write(self, client: str, parts: dict[str, AdapterState]) -> None:
        """Keep `parts` in place of what the client has kept so far, from `commit` on."""
        tensors = {f"{part}/{key}": tensor for part, state in parts.items() for key, tensor in state.items()}
        if not tensors:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(client)
        save_file(tensors, path.with_name(f"{path.name}{PENDING}"), metadata={"client": client})

    def commit(self) -> None:
        """At the end of a round: what was written holds."""
        for path in self.folder.glob(f"*{PENDING}"):
            os.replace(path, path.with_name(path.name.removesuffix(PENDING)))

    def discard(self) -> None:
        """Forget what was written since the last `commit`."""
        for path in self.folder.glob(f"*{PENDING}"):
            path.unlink()

    def link_into(self, folder: Path) -> None:
        """Put the files of all clients into `folder`, which is made if there are any."""
        _link_files(self.folder, folder)

    def restore(self, folder: Path) -> None:
        """Go back to what `link_into` has put into `folder`; to nothing if there is no such folder."""
        self.clear()
        _link_files(folder, self.folder)

    def clear(self) -> None:
        """Forget everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, client: str) -> Path:
        name = quote(client, safe=" ")
        if len(name) > LONGEST_NAME:  # file systems take 255 bytes
            name = f"{name[:LONGEST_NAME]}-{hashlib.sha256(client.encode()).hexdigest()[:16]}"
        return self.folder / f"{name}.safetensors"


def _link_files(source: Path, target: Path) -> None:
    if not source.is_dir():
        return
    target.mkdir(parents=True, exist_ok=True)
    for path in source.glob("*.safetensors"):
        try:
            os.link(path, target / path.name)
        except OSError:  # a file system without hard links
            shutil.copy2(path, target / path.name)
