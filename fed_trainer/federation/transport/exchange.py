# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The rounds' packets between machines."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from transformers.utils import logging

from ..packet import Packet, Reply
from .base import Packets, Transport
from .ends import DamagedMessageError, Envelope, NetworkError, Pauses, ServerEnd
from .roster import ABSENT, DECLINED, INVITED, JOINED, SILENT, Roster, reason_of


__all__ = ["Exchange", "check_names", "names_of"]

logger = logging.get_logger(__name__)

RESENDS = 2  # of a message that was damaged on the way
SECONDS_PER_ROLL_CALL = 1.0  # between two looks for processes that have come


@dataclass
class _Round:
    """A round that is on: which message each client has, and which answers have come in."""

    packets: Packets
    number: int
    open: dict[str, Envelope] = field(default_factory=dict)  # by client the answer that is awaited
    ready: dict[str, Envelope] = field(default_factory=dict)  # has come in, and was not read
    resent: dict[str, int] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)  # answered, or given up


class Exchange(Transport):
    """
    Carries packets over a [`Network`] to clients in other processes. Answers are taken in the order of the packets,
    whatever order they come in, so that a round adds up to the same bits as in one process; until their turn they
    stay where they are, so that memory does not grow with the number of clients.

    A process that has begun anew under the name of a client is sent everything again. A client that nobody stands
    for, or that has not answered in time before, is not waited for longer than for the others, until it is heard
    again.

    Args:
        end ([`ServerEnd`]):
            The coordinator's end.
        roster ([`Roster`]):
            Who takes part.
        round_timeout (`float`):
            Seconds after which a client that has not answered is given up.
        saw (`Callable`, *optional*):
            Called with a client, what it does at present and the round, whenever that has changed.
        moved (`Callable`, *optional*):
            Called with a client and the bytes of a message to it, or from it: down and up.
    """

    def __init__(
        self,
        end: ServerEnd,
        roster: Roster,
        round_timeout: float,
        saw: Callable[[str, str, int], None] | None = None,
        moved: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self._end, self._roster, self._round_timeout = end, roster, round_timeout
        self._saw = saw or (lambda client, state, round: None)
        self._moved = moved or (lambda client, down, up: None)
        self._told: dict[str, str] = {}  # by client the session that has answered last: it has the state
        self._called = -math.inf  # when it was last looked for processes

    @property
    def evaluators(self) -> list[str]:
        return [client for client in self._roster.joined if self._roster.about(client).get("has_held_out") is True]

    def gather(self, wait: float, needed: int) -> None:
        """
        Wait for the clients.

        Args:
            wait (`float`):
                Seconds after which it begins without those that have not come.
            needed (`int`):
                How many it needs.

        Raises:
            NetworkError: If there are fewer.
        """
        pauses = Pauses(wait)
        while not pauses.is_over:
            came = self._look(None)
            if all(self._roster.state(client) in (JOINED, DECLINED) for client in self._roster.clients):
                break
            if came:
                pauses.something_came()
            else:
                pauses.wait()
        if len(self._roster.joined) < needed:
            raise NetworkError(self._too_few(wait, needed))

    def _too_few(self, wait: float, needed: int) -> str:
        roster = self._roster
        shown = []
        for client in roster.clients[:10]:
            if roster.state(client) == DECLINED:
                shown.append(f"{client!r} has declined: {roster.reason(client)}")
            elif roster.state(client) != JOINED:
                shown.append(f"{client!r} has not come" if roster.state(client) == ABSENT else f"{client!r} is silent")
        return (
            f"After {wait:g} seconds {len(roster.joined)} of {len(roster.clients)} clients take part, but the run "
            f"needs {needed}. {'; '.join(shown)}. Start the clients, raise `wait`, or lower `min_clients`."
        )

    def exchange(self, packets: Packets, round: int, timeout: float | None = None) -> Iterator[Reply]:
        """As [`Transport.exchange`]; `timeout` is that of the local rounds, to which the clients see themselves."""
        self._end.end_round()
        now = _Round(packets, round)
        pending = list(packets)
        for client in pending:
            self._send(now, client)
        pauses = Pauses(self._round_timeout)
        while pending:
            came = self._look(now)
            while pending and pending[0] in now.ready:
                reply = self._read(now, pending[0])
                if reply is None:
                    break
                now.done.add(pending.pop(0))
                yield reply
                came = True
            if pauses.is_over or not any(self._is_awaited(now, client) for client in pending):
                break
            if came:
                pauses.something_came()
            else:
                pauses.wait()
        for client in pending:
            reply = self._read(now, client, is_last=True) if client in now.ready else None
            yield reply or self._without_answer(client, round)

    def _is_awaited(self, now: _Round, client: str) -> bool:
        return client not in now.ready and self._roster.state(client) in (INVITED, JOINED)

    def _without_answer(self, client: str, round: int) -> Reply:
        state = self._roster.state(client)
        if state in (JOINED, SILENT):
            self._saw(client, "late", round)
            self._roster.fell_silent(client)
            reason = f"it has not answered within {self._round_timeout:g} seconds"
            return Reply(client, "timeout", reason=reason if state == JOINED else "it has been silent for a while")
        self._saw(client, state, round)
        if state == DECLINED:
            return Reply(client, "lost", reason=f"it has declined: {self._roster.reason(client)}")
        return Reply(client, "lost", reason="it has not joined" if state == ABSENT else "it has not accepted yet")

    # What comes in

    def _look(self, now: _Round | None) -> bool:
        """Whether something has come in: processes, and answers, of which only those that are late are read here."""
        came = False
        if time.monotonic() - self._called >= SECONDS_PER_ROLL_CALL:
            self._called = time.monotonic()
            for client in self._roster.look():
                came = True
                self._saw(client, INVITED, now.number if now is not None else 0)
                if now is not None:
                    now.open.pop(client, None)  # what was sent is gone with the process that it was sent to
        for envelope in self._end.arrived():
            client = envelope.client
            self._roster.heard(envelope)
            if self._roster.is_invitation(envelope):
                self._roster.take(envelope)
                self._saw(client, self._roster.state(client), now.number if now is not None else 0)
                if now is not None and client not in now.ready:
                    self._send(now, client)
            elif now is not None and now.open.get(client) == envelope:
                if now.ready.get(client) == envelope:
                    continue
                now.ready[client] = envelope
                self._saw(client, "answered", now.number)
            else:
                self._drop(envelope)
            came = True
        return came

    def _drop(self, envelope: Envelope) -> None:
        """An answer that nobody waits for any more."""
        with contextlib.suppress(DamagedMessageError):
            self._end.read(envelope)
        logger.warning(
            f"Client {envelope.client!r} has answered too late (message {envelope.number}): its answer is dropped, "
            "and counts in no round."
        )

    def _send(self, now: _Round, client: str) -> None:
        """Send a client its packet, if it takes part and is still awaited."""
        if self._roster.state(client) not in (JOINED, SILENT) or client not in now.packets or client in now.done:
            return
        session = self._roster.session(client)
        packet = now.packets[client] if self._told.get(client) == session else now.packets.anew(client)
        content = packet.to_bytes()
        number = self._end.send(client, session, content)
        self._moved(client, len(content), 0)
        now.open[client] = Envelope(client, session, number)
        self._saw(client, "at work", now.number)

    def _read(self, now: _Round, client: str, is_last: bool = False) -> Reply | None:
        """What a client has answered; `None` if it was damaged on the way and the message is sent again."""
        envelope = now.ready.pop(client)
        try:
            content = self._end.read(envelope)
            self._moved(client, 0, len(content))
            answer = Packet.from_bytes(content)
        except (DamagedMessageError, ValueError) as error:
            return self._again(now, client, f"its answer cannot be used: {error}", is_last)
        if answer.kind == "failed":
            reason = reason_of(answer)
            if answer.meta.get("is_damaged") is True:
                return self._again(now, client, reason, is_last)
            self._told[client] = envelope.session
            return Reply(client, "error", reason=reason, seconds=_seconds(answer.meta))
        self._told[client] = envelope.session
        return Reply(client, packet=answer, seconds=_seconds(answer.meta))

    def _again(self, now: _Round, client: str, reason: str, is_last: bool) -> Reply | None:
        self._told.pop(client, None)  # whether it has what was sent is not known
        now.resent[client] = now.resent.get(client, 0) + 1
        if is_last or now.resent[client] > RESENDS:
            return Reply(client, "error", reason=reason)
        logger.warning(f"Client {client!r}, round {now.number}: {reason}. The packet is sent again.")
        self._send(now, client)
        return None


def _seconds(meta: Mapping[str, object]) -> dict[str, float]:
    """What the turn took by phase, of what a client says."""
    told = meta.get("seconds")
    if not isinstance(told, dict):
        return {}
    return {
        str(phase)[:40]: float(value)
        for phase, value in list(told.items())[:10]
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    }


def names_of(end: ServerEnd, number: int, wait: float) -> list[str]:
    """
    The names of the first clients that come, where only their number is known.

    Args:
        end ([`ServerEnd`]):
            The coordinator's end.
        number (`int`):
            How many clients the run has.
        wait (`float`):
            Seconds to wait for them.

    Raises:
        NetworkError: If fewer have come.
    """
    pauses, found = Pauses(wait), 0
    while True:
        members = end.look_for(None)
        if len(members) >= number:
            return sorted(members)[:number]
        if len(members) > found:
            found = len(members)
            pauses.something_came()
        if pauses.is_over:
            raise NetworkError(
                f"After {wait:g} seconds {len(members)} of {number} clients have come"
                f"{f' ({sorted(members)})' if members else ''}. Start the clients, raise `wait`, or lower `clients`."
            )
        pauses.wait()


def check_names(clients: Sequence[str]) -> list[str]:
    """
    The names of the clients of a run, sorted.

    Raises:
        ValueError: If there are none, or one occurs twice.
    """
    names = sorted(clients)
    twice = sorted({name for name in names if names.count(name) > 1})
    if not names or twice:
        raise ValueError(
            f"`clients` should be the names of the clients, each once, or their number, but "
            f"{f'has {twice} more than once' if twice else 'is empty'}."
        )
    return names
