# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Who takes part in a federation between machines: who has come, was invited, has joined or has declined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils import logging

from ..packet import Packet
from .ends import DamagedMessageError, Envelope, ServerEnd


__all__ = ["ABSENT", "DECLINED", "INVITED", "JOINED", "SILENT", "Guest", "Roster", "reason_of"]

logger = logging.get_logger(__name__)

ABSENT, INVITED, JOINED, DECLINED, SILENT = "absent", "invited", "joined", "declined", "silent"
MOST_REASON = 500  # characters of what a client says


@dataclass
class Guest:
    """
    A process that has come under the name of a client.

    Args:
        session (`str`):
            Of the process.
        number (`int`):
            Of the message that has invited it.
        state (`str`):
            `"invited"`, `"joined"`, `"declined"`, or `"silent"` after it has not answered in time.
        about (`dict[str, Any]`, *optional*):
            What the client has said of itself when it joined last, be it another process of it.
        reason (`str`, *optional*):
            Why it has declined.
    """

    session: str
    number: int
    state: str = INVITED
    about: dict[str, Any] | None = None
    reason: str | None = None


class Roster:
    """
    The clients of a run by name, with the latest process of each.

    Args:
        end ([`ServerEnd`]):
            The coordinator's end.
        clients (`Sequence[str]`):
            Their names.
        invitation (`Callable`):
            Makes the packet that a process is invited with.
    """

    def __init__(self, end: ServerEnd, clients: Sequence[str], invitation: Callable[[], Packet]) -> None:
        self._end, self.clients, self._invitation = end, list(clients), invitation
        self._guests: dict[str, Guest] = {}

    def state(self, client: str) -> str:
        """`"absent"`, or that of the process that has come."""
        guest = self._guests.get(client)
        return ABSENT if guest is None else guest.state

    def session(self, client: str) -> str:
        """That of the process that has joined."""
        return self._guests[client].session

    def about(self, client: str) -> dict[str, Any]:
        """What the client has said of itself; nothing if it has never joined."""
        guest = self._guests.get(client)
        return {} if guest is None or guest.about is None else guest.about

    def reason(self, client: str) -> str | None:
        """Why the client has declined, if it has."""
        guest = self._guests.get(client)
        return None if guest is None else guest.reason

    @property
    def joined(self) -> list[str]:
        """The clients that take part."""
        return [client for client in self.clients if self.state(client) == JOINED]

    def fell_silent(self, client: str) -> None:
        """The client has not answered in time: its process may be gone."""
        if self.state(client) == JOINED:
            self._guests[client].state = SILENT

    def heard(self, envelope: Envelope) -> None:
        """A process has answered, to whatever it was."""
        guest = self._guests.get(envelope.client)
        if guest is not None and guest.state == SILENT and guest.session == envelope.session:
            guest.state = JOINED

    def look(self) -> list[str]:
        """Invite every process that was not here before; returns their names."""
        members = self._end.look_for(self.clients)
        new = [
            client
            for client in self.clients
            if client in members
            and (client not in self._guests or self._guests[client].session != members[client].session)
        ]
        for client in new:
            session = members[client].session
            number = self._end.send(client, session, self._invitation().to_bytes())
            self._guests[client] = Guest(session, number, about=self.about(client) or None)
            logger.info(f"Client {client!r} has come and was invited.")
        return new

    def is_invitation(self, envelope: Envelope) -> bool:
        """Whether an answer is that to the invitation of the process that is here."""
        guest = self._guests.get(envelope.client)
        return guest is not None and (guest.session, guest.number) == (envelope.session, envelope.number)

    def take(self, envelope: Envelope) -> None:
        """Read what a process has answered to its invitation."""
        guest = self._guests[envelope.client]
        try:
            answer = Packet.from_bytes(self._end.read(envelope))
        except (DamagedMessageError, ValueError) as error:
            answer = Packet("failed", {}, {"reason": f"its answer cannot be read: {error}"})
        if answer.kind == "joined":
            guest.state, guest.about, guest.reason = JOINED, answer.meta, None
            logger.info(f"Client {envelope.client!r} takes part.")
            return
        guest.state, guest.reason = DECLINED, reason_of(answer)
        logger.warning(f"Client {envelope.client!r} does not take part: {guest.reason}")


def reason_of(answer: Packet) -> str:
    """Why nothing came of a message, as the client says it."""
    reason = answer.meta.get("reason")
    if not isinstance(reason, str) or not reason:
        return f"it has answered {answer.kind[:40]!r}, without a reason"
    return reason[:MOST_REASON]
