# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""One coordinator at a time, without clocks that agree: a lease that its holder renews, seen to change or not."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

from transformers.utils import logging

from .names import MEMBERS, generation_of
from .objects import Objects, StoreError


__all__ = ["COORDINATOR", "Lease", "LeaseLostError", "read_lease"]

logger = logging.get_logger(__name__)

COORDINATOR = "coordinator"  # the note
BEATS_PER_LEASE = 5
TYPES: dict[str, type] = {
    "run": str,
    "generation": int,
    "holder": str,
    "beat": int,
    "seconds": float,
    "is_over": bool,
}


def read_lease(objects: Objects) -> dict[str, Any] | None:
    """The coordinator's note; `None` if there is none, or it cannot be read at this moment."""
    note = objects.read_note(COORDINATOR)
    if note is None or any(type(note.get(name)) is not kind for name, kind in TYPES.items()):
        return None
    return note


class LeaseLostError(StoreError):
    """Another coordinator has taken over."""


class Lease:
    """
    The right to coordinate the run at an address. The note `coordinator.json` names the run, the generation (one more
    each time that the run is taken up) and the holder, which raises its `beat` again and again. Whoever finds a note
    watches it for as long as a lease lasts: if it changes meanwhile, its holder is alive.

    Args:
        objects ([`Objects`]):
            The address.
        seconds (`float`, *optional*, defaults to `20.0`):
            How long a lease lasts without being renewed.
        sleep (`Callable`, *optional*):
            That of `time`.
    """

    def __init__(self, objects: Objects, seconds: float = 20.0, sleep: Callable[[float], None] = time.sleep) -> None:
        self._objects, self._seconds, self._sleep = objects, seconds, sleep
        self._note: dict[str, Any] = {}
        self._lost: Exception | None = None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def generation(self) -> int:
        """How often the run has been taken up, this time included."""
        return int(self._note["generation"])

    def acquire(self, run: str) -> None:
        """
        Take the lease for a run, and keep it until `release`.

        Raises:
            StoreError: If another run is at the address, or somebody coordinates it.
        """
        before = self._before()
        if before is not None:
            if not before.get("is_void"):
                self._refuse_another_run(before, run)
            if not before["is_over"]:
                self._refuse_a_living_holder(before)
        else:
            self._refuse_what_no_run_has_left()
        generation = 1 + (before["generation"] if before is not None else 0)
        self._note = {"run": run, "generation": generation, "holder": secrets.token_hex(8), "beat": 0}
        self._note |= {"seconds": float(self._seconds), "is_over": False, "is_finished": False, "reason": None}
        self._note["is_void"] = True
        self._objects.write_note(COORDINATOR, self._note)
        self._sleep(self._seconds / BEATS_PER_LEASE)  # of two who have come here at once, the later write holds
        self._check_holder()
        self._keep()

    def _keep(self) -> None:
        self._thread = threading.Thread(target=self._renew_again_and_again, name="lease", daemon=True)
        self._thread.start()

    def _before(self) -> dict[str, Any] | None:
        """The note that is there; one that cannot be read is being written, or was not written to its end."""
        for _ in range(BEATS_PER_LEASE):
            note = read_lease(self._objects)
            if note is not None or not self._objects.has_note(COORDINATOR):
                return note
            self._sleep(self._seconds / BEATS_PER_LEASE)
        raise StoreError(
            f"What lies at {self._objects.address!r} as `{COORDINATOR}.json` is no note of a coordinator. Choose "
            "another address; if a run was cut off there, delete that file and resume the run."
        )

    def begin(self) -> None:
        """From now on another run may not take the place of this one."""
        self._note["is_void"] = False
        self.renew()

    def check(self) -> None:
        """
        Raises:
            StoreError: If the lease was lost, or could not be renewed.
        """
        if self._lost is not None:
            raise self._lost

    def release(self, reason: str, is_finished: bool, is_void: bool = False) -> None:
        """Give the lease back, and say why; if the run is void, another one may take its place."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        if self._lost is None:
            ending = {"is_over": True, "is_finished": is_finished, "is_void": is_void, "reason": reason}
            self._objects.write_note(COORDINATOR, {**self._note, **ending})

    def renew(self) -> None:
        """
        Show that this coordinator is alive.

        Raises:
            StoreError: If another one has taken over, or the store cannot be used.
        """
        self._check_holder()
        self._note["beat"] += 1
        self._objects.write_note(COORDINATOR, self._note)

    def _renew_again_and_again(self) -> None:
        while not self._over.wait(self._seconds / BEATS_PER_LEASE):
            try:
                self.renew()
            except StoreError as error:
                self._lost = error
                return

    def _check_holder(self) -> None:
        now = read_lease(self._objects)
        # one of an earlier generation is seen late
        if now is not None and now["holder"] != self._note["holder"] and now["generation"] >= self.generation:
            raise LeaseLostError(
                f"Another coordinator has taken over the run at {self._objects.address!r}, so this one stops. Start "
                "one coordinator only."
            )

    def _refuse_what_no_run_has_left(self) -> None:
        """Messages are deleted by the folder, so nothing of anybody else's may be where they are going to be."""
        taken = [name for name in self._objects.files.names("") if name == MEMBERS or generation_of(name) is not None]
        if taken:
            raise StoreError(
                f"At {self._objects.address!r} there is {taken[0]!r}, but no run that it is of. Choose another "
                "address, or move it away."
            )

    def _refuse_another_run(self, note: dict[str, Any], run: str) -> None:
        if note["run"] != run:
            raise StoreError(
                f"At {self._objects.address!r} there is another run ({note['run']!r}, not {run!r}). Choose "
                "another address, or resume that run from its own `output_dir`."
            )

    def _refuse_a_living_holder(self, before: dict[str, Any]) -> None:
        seconds = max(self._seconds, before["seconds"])  # it may renew its lease less often
        logger.warning(
            f"Somebody has coordinated the run at {self._objects.address!r}; watching for {seconds:.0f} seconds "
            "whether it still does."
        )
        for _ in range(BEATS_PER_LEASE):
            self._sleep(seconds / BEATS_PER_LEASE)
            now = self._before()
            if now is not None and not now["is_over"] and now != before:
                raise StoreError(
                    f"Another coordinator serves the run at {self._objects.address!r} at this moment. Stop it first; "
                    "there is one coordinator at a time."
                )
