# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Objects at an address: whole or not there, asked for by name and never listed."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ..ends import DamagedMessageError
from .files import FIRST_PAUSE, Files, StoreError


__all__ = ["DamagedObjectError", "Marker", "Objects", "StoreError"]

PAYLOAD, MARKER = ".bin", ".json"
ATTEMPTS = 7  # at a payload that comes to be seen after its marker: with growing pauses, six seconds
ATTEMPTS_IF_WHOLE = 3  # at one that is there, and another one


class DamagedObjectError(DamagedMessageError):
    """An object that is not what its marker says."""


@dataclass(frozen=True)
class Marker:
    """
    What is written after a payload, and says that it is whole.

    Args:
        sha256 (`str`), size (`int`):
            Of the payload.
        number (`int`, *optional*, defaults to 0):
            Of the message in a [`Box`].
        previous (`int`, *optional*, defaults to 0):
            The number of the message that was there before it.
    """

    sha256: str
    size: int
    number: int = 0
    previous: int = 0

    @classmethod
    def of(cls, content: bytes, number: int = 0, previous: int = 0) -> Marker:
        return cls(hashlib.sha256(content).hexdigest(), len(content), number, previous)

    @classmethod
    def parsed(cls, note: dict[str, Any] | None) -> Marker | None:
        """`None` for what is no marker."""
        if note is None:
            return None
        sha256, numbers = note.get("sha256"), [note.get(name) for name in ("size", "number", "previous")]
        if not isinstance(sha256, str) or not all(type(number) is int for number in numbers):
            return None
        return cls(sha256, *numbers)  # type: ignore[arg-type]

    def fits(self, content: bytes) -> bool:
        return len(content) == self.size and hashlib.sha256(content).hexdigest() == self.sha256


class Objects:
    """
    What is below one address. An object is a payload and, written after it, a small marker with its digest: without a
    marker there is no object, so that nothing half-written is read. Objects are looked for by name, which needs no
    listing and so works where a listing lags behind.

    Args:
        address (`str`):
            Whatever [`fsspec.url_to_fs`](https://filesystem-spec.readthedocs.io) takes: a folder, `s3://bucket/path`,
            `memory://path`, ...
        patience (`float`, *optional*, defaults to `300.0`):
            Seconds for which a store that does not answer is tried again.
        storage_options (`dict`, *optional*):
            Passed to the file system, such as `{"endpoint_url": ...}`.
        sleep, clock (`Callable`, *optional*):
            Those of `time`.

    Raises:
        StoreError: If the address cannot be opened; the message says what is missing.
    """

    def __init__(
        self,
        address: str,
        patience: float = 300.0,
        storage_options: dict[str, Any] | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.files = Files(address, patience, storage_options, sleep, clock)
        self.address = address

    def put(self, name: str, content: bytes) -> None:
        """Write an object; the same again is no harm."""
        self.files.write(f"{name}{PAYLOAD}", content)
        self.write_marker(name, Marker.of(content))

    def get(self, name: str) -> bytes | None:
        """
        An object; `None` if it is not there yet.

        Raises:
            DamagedObjectError: If it is not what was written.
        """
        marker = self.marker(name)
        return None if marker is None else self.payload(name, marker)

    def is_there(self, name: str) -> bool:
        """Whether the object is there, whole."""
        return self.marker(name) is not None

    def marker(self, name: str) -> Marker | None:
        """That of an object; `None` if it is not there yet."""
        return Marker.parsed(self.read_note(name))

    def write_marker(self, name: str, marker: Marker) -> None:
        """Say that a payload is whole."""
        self.write_note(name, asdict(marker))

    def payload(self, name: str, marker: Marker) -> bytes:
        """
        The payload that a marker is about.

        Raises:
            DamagedObjectError: If it is not what was written, after a while.
        """
        pause, left = FIRST_PAUSE, ATTEMPTS
        while True:
            content = self.files.read(f"{name}{PAYLOAD}")
            if content is not None and marker.fits(content):
                return content
            left = min(left - 1, ATTEMPTS if content is None or len(content) < marker.size else ATTEMPTS_IF_WHOLE - 1)
            if left <= 0:
                break
            self.files.sleep(pause)
            pause *= 2
        found = "is not there" if content is None else f"has {len(content)} bytes of another content"
        raise DamagedObjectError(f"{name}{PAYLOAD} {found}, but was written with {marker.size}")

    # Small ones, which change

    def write_note(self, name: str, content: dict[str, Any]) -> None:
        """Write a small object in place of what is there."""
        self.files.replace(f"{name}{MARKER}", json.dumps(content, allow_nan=False).encode())

    def read_note(self, name: str) -> dict[str, Any] | None:
        """A small object; `None` if it is not there, or just being written."""
        return _parsed(self.files.read(f"{name}{MARKER}"))

    def has_note(self, name: str) -> bool:
        """Whether there is something under its name, be it half a note."""
        return self.files.read(f"{name}{MARKER}") is not None


def _parsed(content: bytes | None) -> dict[str, Any] | None:
    if content is None:
        return None
    try:
        parsed = json.loads(content)
    except ValueError:  # half of it
        return None
    return parsed if isinstance(parsed, dict) else None
