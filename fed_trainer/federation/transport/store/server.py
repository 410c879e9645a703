# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The coordinator's end of a store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from transformers.utils import logging

from ..ends import DamagedMessageError, Envelope, Member, ServerEnd
from .box import Box
from .lease import Lease
from .names import (
    MEMBERS,
    check_name,
    down_name,
    generation_of,
    greeting_name,
    is_session,
    member_name,
    session_name,
    up_name,
)
from .objects import DamagedObjectError, Marker, Objects


__all__ = ["STATUS", "StoreServerEnd"]

logger = logging.get_logger(__name__)

STATUS = "status"  # the note that shows how the run goes


@dataclass
class _Enrolment:
    """What the latest process under a name says of itself, and where it stands."""

    number: int
    marker: Marker
    member: Member | None  # none, if it cannot be read


@dataclass
class _Talk:
    """What went to and fro with a process: the number of the last message, and of the last answer that was read."""

    sent: int = 0
    read: int = 0
    lies: int = 0  # the message that is there, if there is one
    arrived: dict[int, Marker | None] = field(default_factory=dict)  # by number; none if a newer one has come since


class StoreServerEnd(ServerEnd):
    """
    Writes what clients are to read, and looks for their answers, by name. What nobody reads any more is deleted: a
    message once it is answered or void, an answer once it is taken, what went to a process once another one has come
    in its place, and what went to all of them when the run is taken up again or has come to its end.

    Args:
        objects ([`Objects`]):
            The address.
        lease ([`Lease`]):
            The right to coordinate there.
    """

    def __init__(self, objects: Objects, lease: Lease) -> None:
        self._objects, self._lease = objects, lease
        self._enrolments: dict[str, _Enrolment] = {}
        self._talks: dict[tuple[str, str], _Talk] = {}  # by client and session

    @property
    def generation(self) -> int:
        return self._lease.generation

    def open(self, run: str) -> None:
        self._lease.acquire(run)

    def begin(self) -> None:
        self._lease.begin()

    def greet(self, greeting: bytes) -> None:
        self._objects.put(greeting_name(self.generation), greeting)
        self._delete_generations(self.generation - 1)

    def _delete_generations(self, last: int) -> None:
        for name in self._objects.files.names(""):
            generation = generation_of(name)
            if generation is not None and generation <= last:
                self._objects.files.delete_folder(name)

    def look_for(self, clients: Sequence[str] | None) -> dict[str, Member]:
        self._lease.check()
        for client in clients or ():
            check_name(client)
        for client in self._objects.files.names(MEMBERS) if clients is None else clients:
            self._look_for(client)
        return {client: enrolment.member for client, enrolment in self._enrolments.items() if enrolment.member}

    def _look_for(self, client: str) -> None:
        """The newest enrolment; two processes that came at once may have written the same one."""
        known = self._enrolments.get(client)
        number = 1 if known is None else known.number
        while (marker := self._objects.marker(member_name(client, number))) is not None:
            if known is None or (number, marker) != (known.number, known.marker):
                member = self._member(client, number, marker) or (None if known is None else known.member)
                known = self._enrolments[client] = _Enrolment(number, marker, member)
            number += 1

    def _member(self, client: str, number: int, marker: Marker) -> Member | None:
        try:
            content = self._objects.payload(member_name(client, number), marker)
        except DamagedObjectError as damage:
            logger.warning(f"What a process has said of itself as client {client!r} cannot be read: {damage}")
            return None
        session, _, hello = content.partition(b"\n")
        text = session.decode(errors="replace")
        return Member(text, hello) if is_session(text) else None

    def next_number(self, client: str, session: str) -> int:
        talk = self._talks.get((client, session))
        return 1 if talk is None else talk.sent + 1

    def send(self, client: str, session: str, content: bytes) -> int:
        self._lease.check()
        talk = self._talks.setdefault((client, session), _Talk())
        box, void = self._box(down_name, client, session), talk.lies
        talk.sent = talk.lies = talk.sent + 1
        box.post(talk.sent, content)
        if void:
            box.clear(void)
        return talk.sent

    def arrived(self) -> list[Envelope]:
        self._lease.check()
        found = []
        for (client, session), talk in self._talks.items():
            if not talk.arrived and talk.read < talk.sent:
                newest = self._box(up_name, client, session).newest()
                if newest is not None and talk.read < newest.number <= talk.sent:
                    if talk.read < newest.previous < newest.number:
                        talk.arrived[newest.previous] = None
                    talk.arrived[newest.number] = newest
            found += [Envelope(client, session, number) for number in talk.arrived]
        return found

    def read(self, envelope: Envelope) -> bytes:
        client, session, number = envelope.client, envelope.session, envelope.number
        talk = self._talks.get((client, session))
        marker = None if talk is None else talk.arrived.pop(number, None)
        if talk is None or marker is None:
            raise DamagedMessageError("the answer is not there any more")
        box = self._box(up_name, client, session)
        try:
            return box.take(marker)
        finally:
            talk.read = number
            box.clear(number)
            if 0 < talk.lies <= number:
                self._box(down_name, client, session).clear(talk.lies)
                talk.lies = 0

    def _box(self, name: Callable[[int, str, str], str], client: str, session: str) -> Box:
        return Box(self._objects, name(self.generation, client, session))

    def show(self, note: dict[str, object]) -> None:
        self._objects.write_note(STATUS, note)

    def end_round(self) -> None:
        """What was sent to a process in whose place another one has come is void."""
        for client, session in list(self._talks):
            enrolment = self._enrolments.get(client)
            if enrolment is not None and enrolment.member is not None and enrolment.member.session != session:
                del self._talks[(client, session)]
                self._objects.files.delete_folder(session_name(self.generation, client, session))

    def close(self, reason: str, is_finished: bool, is_void: bool = False) -> None:
        self._lease.release(reason, is_finished, is_void)
        if is_finished:
            self._delete_generations(self.generation)
