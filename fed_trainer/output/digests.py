# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What a run has written into a folder, by SHA-256, and whether it is still that."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from peft_scl.foreign_files import read_json, read_shapes

from .client_files import CLIENTS_FOLDER, check_owner
from .disk import DamagedFileError, file_digest, reading
from .owned import stays_inside
from .record import RECORD_NAME, ROUNDS_NAME, read_rounds, write_json


__all__ = ["DIGESTS_NAME", "SERVER_STATE", "TRAINER_STATE_NAME", "find_damage", "read_digests", "write_digests"]

DIGESTS_NAME = "digests.json"
TRAINER_STATE_NAME = "trainer_state.json"
SERVER_STATE = "server_state.safetensors"
# what a resumed run reads if it is there, and therefore must not have appeared later
READ_ON_RESUMING = (
    "adapter_config.json", "adapter_model.safetensors", "config.json", "model.safetensors",
    "model.safetensors.index.json", RECORD_NAME, ROUNDS_NAME, SERVER_STATE, TRAINER_STATE_NAME,
)  # fmt: skip
SIZE = " bytes"  # of a client's file, in checkpoints of the first versions


def write_digests(folder: Path, names: Iterable[str], known: Mapping[str, str] | None = None) -> None:
    """
    Write `digests.json`: by path within `folder` the SHA-256 of a file. When this returns, all of them are on the
    disk.

    Args:
        folder (`Path`):
            The folder.
        names (`Iterable[str]`):
            Paths within it, with `/`.
        known (`Mapping[str, str]`, *optional*):
            Further files whose digests were computed when they were written, and which are on the disk.
    """
    digests = {name: file_digest(folder / name, durably=True) for name in names if name != DIGESTS_NAME}
    write_json(folder / DIGESTS_NAME, dict(sorted({**digests, **(known or {})}.items())))


def read_digests(folder: Path) -> dict[str, str]:
    """
    The content of `digests.json`.

    Raises:
        DamagedFileError: If it is not what `write_digests` writes.
    """
    with reading(DIGESTS_NAME):
        digests = read_json(folder / DIGESTS_NAME)
    if not all(isinstance(digest, str) for digest in digests.values()):
        raise DamagedFileError(f"{DIGESTS_NAME} holds no digests by name")
    for name in digests:
        if not stays_inside(name):
            raise DamagedFileError(f"{DIGESTS_NAME} names {name!r}, which is outside the folder")
    return digests


def find_damage(folder: str | os.PathLike, clients: bool = True) -> str | None:
    """
    What is wrong with a checkpoint, if something is: a file that is missing, cannot be read, is not the one that was
    written, or was not written by the run. Other files of the user's do not matter.

    Args:
        folder (`str`):
            The checkpoint.
        clients (`bool`, *optional*, defaults to `True`):
            Whether to read the files of clients too, of which there may be very many.
    """
    folder = Path(folder)
    if not os.path.lexists(folder / DIGESTS_NAME):
        return f"it has no {DIGESTS_NAME} (as a folder from the Hub, which can be an `initial_adapter`)"
    try:
        digests = read_digests(folder)
        for name, digest in digests.items():
            if clients or not _is_of_client(name):
                _check_file(folder, name, digest)
        with reading(CLIENTS_FOLDER):
            found = [
                f"{CLIENTS_FOLDER}/{path.name}" for path in sorted((folder / CLIENTS_FOLDER).glob("*.safetensors"))
            ]
        for name in [*READ_ON_RESUMING, *found]:
            if name not in digests and os.path.lexists(folder / name):
                raise DamagedFileError(f"{name} is not in {DIGESTS_NAME}")
    except DamagedFileError as damage:
        return str(damage)
    return None


def _check_file(folder: Path, name: str, digest: str) -> None:
    path = folder / name
    with reading(name):
        if not os.path.lexists(path):
            raise DamagedFileError(f"{name} is missing")
        found = f"{path.stat().st_size}{SIZE}" if digest.endswith(SIZE) and path.is_file() else file_digest(path)
        if found != digest:
            raise DamagedFileError(f"{name} is not what was written")
        if name in READ_ON_RESUMING and name.endswith(".json"):
            read_json(path)
        if name == ROUNDS_NAME:
            read_rounds(path)
        if _is_of_client(name):
            check_owner(path)
        elif name in READ_ON_RESUMING and name.endswith(".safetensors"):
            read_shapes(path)


def _is_of_client(name: str) -> bool:
    return name.startswith(f"{CLIENTS_FOLDER}/")
