# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Messages from one process to one other, of which the newest counts."""

from __future__ import annotations

from .objects import PAYLOAD, Marker, Objects


__all__ = ["Box"]


class Box:
    """
    One writes numbered messages, the other one reads the newest. Each message is a payload of its own; the marker is
    that of the newest, so that what is there does not grow with what was sent. A store that shows an older marker
    for a while shows a message late, but none twice: the reader knows which number it had last.

    Args:
        objects ([`Objects`]):
            The address.
        name (`str`):
            Of the box.
    """

    def __init__(self, objects: Objects, name: str) -> None:
        self._objects, self._name = objects, name

    def post(self, number: int, content: bytes, previous: int = 0) -> None:
        """Write a message, newer than all before; `previous` is the number of the last of them."""
        marker = Marker.of(content, number, previous)
        self._objects.files.write(f"{self._payload(number)}{PAYLOAD}", content)
        self._objects.write_marker(self._name, marker)

    def newest(self) -> Marker | None:
        """The marker of the newest message, as far as it can be seen."""
        marker = self._objects.marker(self._name)
        return marker if marker is not None and marker.number > 0 else None

    def take(self, marker: Marker) -> bytes:
        """
        The message of a marker.

        Raises:
            DamagedObjectError: If it is not what was written, or is not there any more.
        """
        return self._objects.payload(self._payload(marker.number), marker)

    def clear(self, number: int) -> None:
        """Delete a message that nobody will read; the marker stays."""
        self._objects.files.delete(f"{self._payload(number)}{PAYLOAD}")

    def _payload(self, number: int) -> str:
        return f"{self._name}/{number:06d}"
