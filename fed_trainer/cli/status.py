# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""`fed-trainer status --at ADDRESS`"""

from __future__ import annotations

import time
from typing import Any

from ..federation.transport.ends import Network, NetworkError
from ..federation.transport.store import Store
from ..federation.transport.store.lease import BEATS_PER_LEASE, read_lease
from ..federation.transport.store.server import STATUS


__all__ = ["show_status", "status_lines"]

WATCHED_BEATS = 1.5  # within which a living coordinator renews its lease


def show_status(network: Network) -> None:
    """
    Print how a run goes.

    Raises:
        NetworkError: If there is no run, or it cannot be looked into.
    """
    if not isinstance(network, Store):
        raise NetworkError("Only a store can be looked into. Ask the coordinator, or read its `federation.json`.")
    objects = network.objects()
    note = read_lease(objects)
    if note is None:
        raise NetworkError(f"There is no run at {objects.address!r}. Look for a misspelling, or start one there.")
    is_alive = None
    if not note["is_over"]:
        time.sleep(WATCHED_BEATS * note["seconds"] / BEATS_PER_LEASE)
        later = read_lease(objects)
        is_alive = later is not None and later != note
        note = later or note
    for line in status_lines(note, objects.read_note(STATUS) or {}, is_alive):
        print(line)


def status_lines(note: dict[str, Any], status: dict[str, Any], is_alive: bool | None) -> list[str]:
    """
    How a run goes, in lines.

    Args:
        note (`dict`):
            The coordinator's.
        status (`dict`):
            What it shows.
        is_alive (`bool`, *optional*):
            Whether it has renewed its lease; `None` if the run is over.
    """
    if note.get("is_over"):
        state = f"is over: {note.get('reason')}"
    else:
        state = "is served" if is_alive else "has a coordinator that shows no sign of life"
    lines = [f"The run {note.get('run')} {state} (coordinator start {note.get('generation')})."]
    if status:
        lines.append(f"Round {status.get('round')} of {status.get('num_rounds')}.")
        lines += table(status.get("clients") or {})
    return lines


def table(clients: dict[str, Any]) -> list[str]:
    """A line for each client, under a header."""
    header = ("client", "state", "round", "bytes down", "bytes up", "loss")
    rows = [header, *(_row(client, about) for client, about in sorted(clients.items()))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _row(client: str, about: Any) -> tuple[str, ...]:
    about = about if isinstance(about, dict) else {}
    loss = about.get("loss")
    cells = [client, about.get("state"), about.get("round"), about.get("bytes_down"), about.get("bytes_up")]
    shown = [f"{cell:,}" if isinstance(cell, int) else str(cell if cell is not None else "") for cell in cells]
    return (*shown, f"{loss:.4f}" if isinstance(loss, (int, float)) else "")
