# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What clients keep from round to round, on disk: memory does not grow with the number of clients."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file, save

from peft_scl.foreign_files import read_json

from ..output.client_files import OWNER, check_owner, file_name, owner_of
from ..output.disk import DamagedFileError, file_digest, reading, sync, writing
from ..output.owned import MARKER, is_own, make_own, remove_own_files
from ..state.adapter_state import AdapterState


__all__ = ["PRIVATE_FOLDER", "ClientStore"]

PRIVATE_FOLDER = ".fed_clients"  # within `output_dir`: what clients keep at present
PENDING = ".new"
INDEX_NAME = "index.json"
SHA256_LENGTH = 64


class KeptFile(NamedTuple):
    """What is known of a client's file since it was written; `round` is `None` in runs of the first versions."""

    client: str
    round: int | None
    digest: str
    size: int


class ClientStore:
    """
    One safetensors file per client. A file is written beside and renamed at the end of the round, and never changed afterwards:
    a round that breaks off leaves all clients as they were, and checkpoints hold hard links instead of copies.

    The digest of a file is computed once, when it is written, and kept in `index.json` with the client and the round;
    whenever the file is read, it is compared. The first process writes, the others read.

    Args:
        folder (`Path`):
            Where the files are; made at the first `write`, and marked as a run's own.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._index: dict[str, KeptFile] = {}  # by name of file
        self._version: tuple[int, int] | None = None  # of the index on disk
        self._pending: dict[str, KeptFile] = {}
        self._unproven: set[str] = set()  # written since the last checkpoint

    def read(self, client: str) -> dict[str, AdapterState]:
        """
        What the client has kept, by part; empty for a client that has kept nothing.

        Raises:
            DamagedFileError: If it is not what was written.
        """
        path = self._path(client)
        self._refresh()
        parts: dict[str, AdapterState] = {}
        if (kept := self._index.get(path.name)) is None:
            return parts
        try:
            with reading(path.name):
                if file_digest(path) != kept.digest:
                    raise DamagedFileError(_difference(path, kept))
                # into memory of its own: a memory map, the default, keeps some bytes per tensor for good (safetensors
                # 0.8.0)
                tensors = load_file(path, backend="pread")
        except DamagedFileError as damage:
            raise DamagedFileError(
                f"What client {client!r} keeps is damaged, in {str(self.folder)!r}: {damage}. `train(resume_from_checkpoint=True)` "
                "continues from the last checkpoint that is not."
            ) from damage
        for entry, tensor in tensors.items():
            part, _, key = entry.partition("/")
            parts.setdefault(part, {})[key] = tensor
        return parts

    def write(self, client: str, parts: dict[str, AdapterState], round: int) -> None:
        """Keep `parts`, of `round`, in place of what the client has kept so far, from `commit` on."""
        tensors = {f"{part}/{key}": tensor for part, state in parts.items() for key, tensor in state.items()}
        if not tensors:
            return
        if not self.folder.is_dir():
            self._make_folder()
        path = self._path(client)
        # one entry: safetensors writes several in any order, and the same state should be the same file
        content = save(tensors, metadata={OWNER: json.dumps({"client": client, "round": round})})
        with writing(f"What client {client!r} keeps"):
            path.with_name(f"{path.name}{PENDING}").write_bytes(content)
        self._pending[path.name] = KeptFile(client, round, hashlib.sha256(content).hexdigest(), len(content))

    def commit(self) -> None:
        """At the end of a round: what was written holds."""
        if not self._pending:
            return
        for name in self._pending:
            os.replace(self.folder / f"{name}{PENDING}", self.folder / name)
        self._index |= self._pending
        self._unproven |= self._pending.keys()
        self._pending = {}
        self._write_index()

    def discard(self) -> None:
        """Forget what was written since the last `commit`."""
        remove_own_files(self.folder, [f"{name}{PENDING}" for name in self._pending])
        self._pending = {}

    def link_into(self, folder: Path) -> dict[str, str]:
        """
        Put the files of all clients into `folder`, which is made if there are any, and onto the disk.

        Returns:
            `dict[str, str]`: Their digests by name: those that were computed when the files were written.

        Raises:
            DamagedFileError: If a file is not what was written; those that are in an earlier checkpoint are compared
                by size.
        """
        if not self._index:
            return {}
        folder.mkdir(parents=True, exist_ok=True)
        for name, kept in self._index.items():
            path = self.folder / name
            with reading(f"What client {kept.client!r} keeps, {name},"):
                is_new = name in self._unproven
                if path.stat().st_size != kept.size or (is_new and file_digest(path, durably=True) != kept.digest):
                    raise DamagedFileError(f"What client {kept.client!r} keeps is damaged: {_difference(path, kept)}")
            _link(path, folder / name)
        sync(folder)
        self._unproven = set()
        return {name: kept.digest for name, kept in self._index.items()}

    def restore(self, folder: Path, digests: Mapping[str, str]) -> None:
        """
        Go back to what `link_into` has put into `folder`.

        Args:
            folder (`Path`):
                Folder of a checkpoint that is not damaged.
            digests (`Mapping[str, str]`):
                What is in it, as `link_into` has returned it; the first versions had sizes in place of the digests.
        """
        self.clear()
        if not digests:
            return
        self._make_folder()
        for name, digest in digests.items():
            path = folder / name
            _link(path, self.folder / name)
            digest = digest if len(digest) == SHA256_LENGTH else file_digest(path)
            self._index[name] = KeptFile(*check_owner(path), digest, path.stat().st_size)
        self._write_index()

    def clear(self) -> None:
        """
        Forget everything, and delete what runs have written here.

        Raises:
            FileExistsError: If there is something else too.
        """
        self.forget()
        if not os.path.lexists(self.folder):
            return
        own, foreign = self._found()
        if foreign:
            shown = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
            raise FileExistsError(
                f"{str(self.folder)!r} holds what no run has written ({shown}). A run keeps there what its clients keep, and would "
                "write over it. Move that away, or choose another `output_dir`."
            )
        remove_own_files(self.folder, [*own, MARKER])  # the mark last

    def forget(self) -> None:
        """Forget everything, without a look at the disk."""
        self._index, self._pending, self._unproven, self._version = {}, {}, set(), None

    def _found(self) -> tuple[list[str], list[str]]:
        """The names of what runs have written into the folder, without its mark, and of what else is there."""
        if not self.folder.is_dir() or not is_own(self.folder):
            return [], [path.name for path in sorted(self.folder.iterdir())] if self.folder.is_dir() else ["a file"]
        listed = _read_index(self.folder / INDEX_NAME) or {}
        own: list[str] = []
        foreign: list[str] = []
        for path in sorted(self.folder.iterdir()):
            is_unfinished = path.name.endswith(f".safetensors{PENDING}") or path.name == f".{INDEX_NAME}.tmp"
            is_listed = is_unfinished or path.name == INDEX_NAME or path.name in listed
            is_named = path.name == MARKER or (path.is_file() and (is_listed or _is_clients(path)))
            (own if is_named else foreign).append(path.name)
        return [name for name in own if name != MARKER], foreign

    def _make_folder(self) -> None:
        with writing(f"{str(self.folder)!r}"):
            make_own(self.folder)

    def _write_index(self) -> None:
        path = self.folder / INDEX_NAME
        beside = self.folder / f".{INDEX_NAME}.tmp"
        # for other processes, and to know what is ours; a resumed run has it from a checkpoint
        with writing(str(path)):
            beside.write_text(json.dumps(self._index), encoding="utf-8")
            os.replace(beside, path)
        self._version = _version(path)

    def _refresh(self) -> None:
        """Take over what the first process has written."""
        path = self.folder / INDEX_NAME
        version = _version(path)
        if version == self._version:
            return
        index = _read_index(path)
        if index is None:
            raise DamagedFileError(
                f"{str(path)!r} is not what was written, so nothing is known of what clients keep. "
                "`train(resume_from_checkpoint=True)` continues from the last checkpoint."
            )
        self._index, self._version = index, version

    def _path(self, client: str) -> Path:
        return self.folder / file_name(client)


def _difference(path: Path, kept: KeptFile) -> str:
    """In what a file is not what was written."""
    try:
        client, round = owner_of(path)
    except Exception:  # whatever a damaged header leads to
        client, round = kept.client, kept.round
    if (client, round) == (kept.client, kept.round):
        return f"{path.name} is not what was written"
    return f"{path.name} holds what client {client!r} kept in round {round}, not {kept.client!r} in round {kept.round}"


def _is_clients(path: Path) -> bool:
    try:
        check_owner(path)
    except DamagedFileError:
        return False
    return True


def _read_index(path: Path) -> dict[str, KeptFile] | None:
    """`None` if it cannot be read."""
    try:
        with reading(path.name):
            return {name: KeptFile(*fields) for name, fields in read_json(path).items()}
    except DamagedFileError:
        return None


def _version(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:  # a file system without hard links
        shutil.copy2(path, target)
        sync(target)
