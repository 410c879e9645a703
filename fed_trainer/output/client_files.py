# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The file of what a client keeps: its name, and whose it says it is."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from urllib.parse import quote

from safetensors import safe_open

from .disk import DamagedFileError, reading


__all__ = ["CLIENTS_FOLDER", "FIRST_VERSIONS", "OWNER", "check_owner", "file_name", "owner_of"]

CLIENTS_FOLDER = "clients"  # within a checkpoint: what they kept then
OWNER = "kept_by"  # in the metadata of a file; the first versions had the name of the client only, as `client`
FIRST_VERSIONS = 0  # the round of files that do not tell theirs
LONGEST_NAME = 120


def check_owner(path: Path) -> tuple[str, int | None]:
    """
    The client and the round of a file, as it says.

    Raises:
        DamagedFileError: If it has the name of another client.
    """
    with reading(path.name):
        client, round = owner_of(path)
        in_store = file_name(client, FIRST_VERSIONS if round is None else round)
        if path.name not in (file_name(client), in_store):
            raise DamagedFileError(f"{path.name} holds what client {client!r} keeps")
    return client, round


def owner_of(path: Path) -> tuple[str, int | None]:
    """The client and the round that the metadata of a file names; no round in files of the first versions."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    if OWNER not in metadata:
        return metadata["client"], None
    owner = json.loads(metadata[OWNER])
    return str(owner["client"]), int(owner["round"])


def file_name(client: str, round: int | None = None) -> str:
    """
    The name of the file of a client: its own, as far as file systems take it, and in the store of a run, which may
    hold two, the round behind it.
    """
    name = quote(client, safe=" ")  # which has no @
    if len(name) > LONGEST_NAME:  # file systems take 255 bytes
        name = f"{name[:LONGEST_NAME]}-{hashlib.sha256(client.encode()).hexdigest()[:16]}"
    return f"{name}.safetensors" if round is None else f"{name}@{round}.safetensors"
