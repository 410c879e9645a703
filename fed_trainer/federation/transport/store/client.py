# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""A client's end of a store."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Any

from transformers.utils import logging

from ..ends import ClientEnd, EndedError
from .box import Box
from .lease import read_lease
from .names import check_name, down_name, greeting_name, member_name, up_name
from .objects import DamagedObjectError, Marker, Objects


__all__ = ["StoreClientEnd"]

logger = logging.get_logger(__name__)

LOOKS_PER_NOTE = 5  # of those for a message, one is at the coordinator's note, too


class StoreClientEnd(ClientEnd):
    """
    Looks for messages, and writes the answers beside them, by name. Of messages that have come in while it was busy,
    the last one counts.

    Args:
        objects ([`Objects`]):
            The address.
        client (`str`):
            The name.
        patience (`float`):
            Seconds without a sign of the coordinator after which it counts as gone.
        clock (`Callable`, *optional*):
            That of `time`.
    """

    def __init__(
        self, objects: Objects, client: str, patience: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._objects, self.client, self._patience, self._clock = objects, check_name(client), patience, clock
        self._session = secrets.token_hex(8)
        self._enrolment = 0  # under which this process is known, and the marker of what it has said
        self._hello = b""
        self._said: Marker | None = None
        self._generation = 0
        self._number = 0  # the last message that was received, of this generation
        self._replied = 0  # the last that was answered, of this generation
        self._note: dict[str, Any] | None = None
        self._heard = clock()
        self._waits_since: float | None = None  # since when it waits for a first message
        self._looks = 0

    @property
    def session(self) -> str:
        return self._session

    @property
    def generation(self) -> int:
        return self._generation

    def look_for_run(self) -> tuple[str, int, bytes] | None:
        self._look_at_the_note(is_first=True)
        if self._note is not None and not self._note["is_over"]:
            greeting = self._greeting(self._note["generation"])
            if greeting is not None:
                self._begin(self._note["generation"])
                return str(self._note["run"]), self._generation, greeting
        self._refuse_to_wait_longer()
        return None

    def _greeting(self, generation: int) -> bytes | None:
        try:
            return self._objects.get(greeting_name(generation))
        except DamagedObjectError as damage:
            logger.warning(f"What the coordinator shows to all cannot be read ({damage}); looking again.")
            return None

    def enrol(self, hello: bytes) -> None:
        self._hello = hello
        content = self._session.encode() + b"\n" + hello
        while True:
            self._enrolment += 1
            name = member_name(self.client, self._enrolment)
            if self._objects.is_there(name):
                continue
            self._objects.put(name, content)
            if self._has_said(name, content):  # or another process was faster
                self._said, self._heard = Marker.of(content), self._clock()
                self._waits_since = self._heard
                return

    def _has_said(self, name: str, content: bytes) -> bool:
        try:
            return self._objects.get(name) in (None, content)  # nothing, as long as it does not show
        except DamagedObjectError:  # two have written at once
            return False

    def look(self) -> tuple[int, bytes | str] | None:
        if self._looks % LOOKS_PER_NOTE == 0:
            self._look_at_the_note()
            self._see_to_namesakes()
        self._looks += 1
        box = self._box(down_name)
        while (newest := box.newest()) is not None and newest.number > self._number:
            self._heard, self._waits_since = self._clock(), None
            try:
                content: bytes | str = box.take(newest)
            except DamagedObjectError as damage:
                if box.newest() != newest:
                    continue  # it was void: there is a newer one by now
                content = f"the message was damaged on the way: {damage}"
            self._number, self._looks = newest.number, 0
            return newest.number, content
        self._refuse_to_wait_longer()
        return None

    def reply(self, number: int, content: bytes) -> None:
        box = self._box(up_name)
        box.post(number, content, self._replied)
        if 0 < self._replied < number:
            box.clear(self._replied)  # if it was not taken yet, nobody will
        self._replied = number
        self._heard = self._clock()

    def _box(self, name: Callable[[int, str, str], str]) -> Box:
        return Box(self._objects, name(self._generation, self.client, self._session))

    def _begin(self, generation: int) -> None:
        self._generation, self._number, self._replied = generation, 0, 0

    def _look_at_the_note(self, is_first: bool = False) -> None:
        """What the coordinator shows: whether it is there, which generation it is, whether the run is over."""
        note = read_lease(self._objects)
        if note is None or note == self._note or (self._note is not None and _is_older(note, self._note)):
            return
        was_known, self._note = self._note is not None, note
        if note["is_over"]:
            if note.get("is_finished") or (was_known and not is_first):
                raise EndedError(f"The run is over: {note.get('reason')}", bool(note.get("is_finished")))
            return  # it may be taken up again
        self._heard = self._clock()
        if not is_first and note["generation"] != self._generation:
            logger.warning(f"The coordinator has taken the run up again (generation {note['generation']}).")
            self._begin(note["generation"])
            self._waits_since = self._clock()

    def _see_to_namesakes(self) -> None:
        if self._said is None:
            return
        if self._objects.is_there(member_name(self.client, self._enrolment + 1)):
            raise EndedError(
                f"Another process has joined under the name {self.client!r} since, and takes part in the place of "
                "this one. Give every site a name of its own."
            )
        here = self._objects.marker(member_name(self.client, self._enrolment))
        if here is not None and here != self._said:  # two have come at once: of these the one that says it again stays
            self.enrol(self._hello)

    def _refuse_to_wait_longer(self) -> None:
        if self._waits_since is not None and self._clock() - self._waits_since >= self._patience:
            raise EndedError(
                f"The coordinator at {self._objects.address!r} is there, but has not invited {self.client!r} within "
                f"{self._patience:g} seconds. Its log says why: it may expect another name, or another key."
            )
        if self._clock() - self._heard >= self._patience:
            raise EndedError(
                f"Nothing was heard of a coordinator at {self._objects.address!r} for {self._patience:g} seconds. "
                "Start this client again once it serves; what was kept is kept."
            )


def _is_older(note: dict[str, Any], known: dict[str, Any]) -> bool:
    """Whether a note is one that was seen already, or was written before it."""
    if note["generation"] != known["generation"] or note["holder"] != known["holder"]:
        return bool(note["generation"] < known["generation"])
    return bool(note["beat"] < known["beat"] or (known["is_over"] and not note["is_over"]))
