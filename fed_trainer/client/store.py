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

from ..output.client_files import FIRST_VERSIONS, OWNER, check_owner, file_name, owner_of
from ..output.disk import DamagedFileError, file_digest, reading, sync, writing
from ..output.owned import MARKER, is_own, make_own, remove_own_files
from ..state.adapter_state import AdapterState


__all__ = ["PRIVATE_FOLDER", "ClientStore"]

PRIVATE_FOLDER = ".fed_clients"  # within `output_dir`: what clients keep at present
PENDING = ".new"
INDEX_NAME = "index.json"
SHA256_LENGTH = 64


class KeptFile(NamedTuple):
    """What is known of a client's file since it was written."""

    client: str
    round: int
    digest: str
    size: int


class ClientStore:
    """
    One safetensors file per client and round. A file never changes after it was written, and a client has two at
    most: that of the last update that counted, and that of its last turn, of which it learns in its next packet
    whether it counted. So a round that breaks off leaves all clients as they were, and checkpoints hold hard links
    instead of copies.

    The digest of a file is computed once, when it is written, and kept in `index.json` with the client and the round;
    whenever the file is read, it is compared. The first process writes, the others read.

    Args:
        folder (`Path`):
            Where the files are; made at the first `write`, and marked as a run's own.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._index: dict[str, KeptFile] = {}  # by name of file
        self._names: dict[str, list[str]] = {}  # of the files of a client, the older first
        self._version: tuple[int, int] | None = None  # of the index on disk
        self._is_unwritten = False  # whether the index has entries that are not on disk
        self._unproven: set[str] = set()  # written since the last checkpoint

    def read(self, client: str, counted: int | None) -> dict[str, AdapterState]:
        """
        What the client has kept, by part; empty for a client that has kept nothing.

        Args:
            client (`str`):
                Its name.
            counted (`int`, *optional*):
                The last round in which its update counted, as its packet says.

        Raises:
            DamagedFileError: If it is not what was written.
        """
        self._refresh()
        parts: dict[str, AdapterState] = {}
        if (name := self._valid(client, counted)) is None:
            return parts
        path, kept = self.folder / name, self._index[name]
        try:
            with reading(path.name):
                if file_digest(path) != kept.digest:
                    raise DamagedFileError(_difference(path, kept))
                # into memory of its own: a memory map, the default, keeps some bytes per tensor for good (safetensors
                # 0.8.0)
                tensors = load_file(path, backend="pread")
        except DamagedFileError as damage:
            raise DamagedFileError(
                f"What client {client!r} keeps is damaged, in {str(self.folder)!r}: {damage}. "
                "`train(resume_from_checkpoint=True)` continues from the last checkpoint that is not."
            ) from damage
        for entry, tensor in tensors.items():
            part, _, key = entry.partition("/")
            parts.setdefault(part, {})[key] = tensor
        return parts

    def round_of(self, client: str, counted: int | None) -> int | None:
        """Of which round is what `read` gives; `None` if there is nothing."""
        self._refresh()
        name = self._valid(client, counted)
        return None if name is None else self._index[name].round

    def write(
        self,
        client: str,
        parts: dict[str, AdapterState],
        round: int,
        counted: int | None,
        saved: int | None = None,
    ) -> None:
        """
        Keep `parts`, of `round`: they hold in place of what the client has kept so far as soon as the update of
        that round is said to have counted.

        Args:
            client (`str`):
                Its name.
            parts (`dict[str, dict[str, torch.Tensor]]`):
                What it is to keep.
            round (`int`):
                The round.
            counted (`int`, *optional*):
                As in `read`: of what is there already, what this leaves open is deleted.
            saved (`int`, *optional*):
                The same, as of a state to which the server may go back: what holds in it stays, too.
        """
        self._drop(client, self._valid(client, counted), self._valid(client, saved))
        tensors = {f"{part}/{key}": tensor for part, state in parts.items() for key, tensor in state.items()}
        if not tensors:
            return
        if not self.folder.is_dir():
            self._make_folder()
        path = self.folder / file_name(client, round)
        # one entry: safetensors writes several in any order, and the same state should be the same file
        content = save(tensors, metadata={OWNER: json.dumps({"client": client, "round": round})})
        beside = path.with_name(f"{path.name}{PENDING}")
        with writing(f"What client {client!r} keeps"):
            beside.write_bytes(content)
            os.replace(beside, path)
        self._enter(path.name, KeptFile(client, round, hashlib.sha256(content).hexdigest(), len(content)))
        self._unproven.add(path.name)
        self._is_unwritten = True

    def settle(self, counted: Mapping[str, int | None]) -> None:
        """
        Where the verdicts are known at once, as in the process of the server: delete what no longer holds, and let
        the other processes know what does.

        Args:
            counted (`Mapping[str, int]`):
                By client the last round in which its update counted.
        """
        for client, round in counted.items():
            self._drop(client, self._valid(client, round))
        if self._is_unwritten:
            self._write_index()

    def link_into(self, folder: Path, counted: Mapping[str, int]) -> dict[str, str]:
        """
        Put what holds of the files of all clients into `folder`, which is made if there are any, and onto the disk.

        Args:
            folder (`Path`):
                Folder of a checkpoint.
            counted (`Mapping[str, int]`):
                By client the last round in which its update counted.

        Returns:
            `dict[str, str]`: Their digests by name: those that were computed when the files were written.

        Raises:
            DamagedFileError: If a file is not what was written; those that are in an earlier checkpoint are compared
                by size.
        """
        valid = {client: self._valid(client, counted.get(client)) for client in self._names}
        names = {file_name(client): name for client, name in valid.items() if name is not None}
        if not names:
            return {}
        folder.mkdir(parents=True, exist_ok=True)
        for target, name in names.items():
            path, kept = self.folder / name, self._index[name]
            with reading(f"What client {kept.client!r} keeps, {name},"):
                is_new = name in self._unproven
                if path.stat().st_size != kept.size or (is_new and file_digest(path, durably=True) != kept.digest):
                    raise DamagedFileError(f"What client {kept.client!r} keeps is damaged: {_difference(path, kept)}")
            _link(path, folder / target)
        sync(folder)
        self._unproven -= set(names.values())
        return {target: self._index[name].digest for target, name in names.items()}

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
            client, round = check_owner(path)
            round = FIRST_VERSIONS if round is None else round
            digest = digest if len(digest) == SHA256_LENGTH else file_digest(path)
            _link(path, self.folder / file_name(client, round))
            self._enter(file_name(client, round), KeptFile(client, round, digest, path.stat().st_size))
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
                f"{str(self.folder)!r} holds what no run has written ({shown}). A run keeps there what its clients "
                "keep, and would write over it. Move that away, or choose another `output_dir`."
            )
        remove_own_files(self.folder, [*own, MARKER])  # the mark last

    def forget(self) -> None:
        """Forget everything, without a look at the disk."""
        self._index, self._names, self._unproven, self._version = {}, {}, set(), None
        self._is_unwritten = False

    def _enter(self, name: str, kept: KeptFile) -> None:
        self._index[name] = kept
        names = self._names.setdefault(kept.client, [])
        if name not in names:
            names.append(name)
            names.sort(key=lambda each: self._index[each].round)

    def _valid(self, client: str, counted: int | None) -> str | None:
        """The file that holds: of the last round that was written and counted."""
        if counted is None:
            return None
        names = self._names.get(client, [])
        return next((name for name in reversed(names) if self._index[name].round <= counted), None)

    def _drop(self, client: str, *kept: str | None) -> None:
        """Delete the files of a client but for these."""
        dropped = [name for name in self._names.get(client, []) if name not in kept]
        if not dropped:
            return
        remove_own_files(self.folder, dropped)
        for name in dropped:
            del self._index[name]
            self._unproven.discard(name)
        self._names[client] = [name for name in self._names[client] if name not in dropped]
        self._is_unwritten = True

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
        self._version, self._is_unwritten = _version(path), False

    def _refresh(self) -> None:
        """Take over what the first process has written."""
        path = self.folder / INDEX_NAME
        version = _version(path)
        if version == self._version or self._is_unwritten:  # the first process knows better
            return
        index = _read_index(path)
        if index is None:
            raise DamagedFileError(
                f"{str(path)!r} is not what was written, so nothing is known of what clients keep. "
                "`train(resume_from_checkpoint=True)` continues from the last checkpoint."
            )
        self._index, self._names, self._version = {}, {}, version
        for name, kept in index.items():
            self._enter(name, kept)


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
