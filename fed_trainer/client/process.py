# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""A process that takes part in a federation elsewhere: it waits for messages, does what they say, and answers."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from transformers.utils import logging

from ..federation.packet import Packet
from ..federation.transport.ends import ClientEnd, EndedError, Network, Pauses
from ..federation.transport.sealed import Sealed, refuse_a_greeting_with_keys
from ..state.client_errors import ClientError, TurnFailedError, public_reason
from ..state.processes import first_alone, told_by_first


__all__ = ["ClientProcess", "DeclinedError", "Gate", "Site", "take_part"]

logger = logging.get_logger(__name__)


class DeclinedError(ValueError):
    """This site does not take part in the run, for a reason that both sides are told."""


class Site(Protocol):
    """What does the work."""

    def accept(self, client: str, invitation: Packet) -> Packet:
        """
        Get ready for the run.

        Raises:
            DeclinedError: If it cannot or will not.
        """

    def turn(self, packet: Packet) -> Packet:
        """A client's turn."""

    def evaluate(self, packet: Packet) -> Packet:
        """A client's evaluation on its own held-out data."""


class Gate(Protocol):
    """What stands between a site and the way out."""

    def check(self, run: Mapping[str, Any], client: str, num_examples: int, world_size: int) -> None:
        """
        Whether a client may take part in a run, as its coordinator describes it.

        Raises:
            DeclinedError: If it may not, for a reason that both sides are told.
        """

    def out(self, client: str, answer: Packet) -> Packet:
        """
        The answer as it may leave.

        Raises:
            ClientError: If it may not, for a reason that the coordinator is told instead.
        """

    def sent(self, client: str, num_bytes: int) -> None:
        """The last one leaves next, as a message of so many bytes: that is written down before."""


class _Message(NamedTuple):
    client: str
    number: int
    content: bytes | str


def take_part(site: Site, network: Network, clients: Sequence[str], gate: Gate | None = None) -> str:
    """
    Wait for a coordinator, say that these clients are here, and take part until the run is over. Of several processes
    of one launch only the first talks.

    Args:
        site ([`Site`]):
            Does the work.
        network ([`Network`]):
            Where the coordinator is met.
        clients (`Sequence[str]`):
            The names of the clients of this process.
        gate ([`Gate`], *optional*):
            What stands between it and the way out.

    Returns:
        `str`: How the run has ended.

    Raises:
        EndedError: If nobody has served for too long, or the run was broken off.
        DeclinedError: If this site does not take part.
        NetworkError: If the network cannot be used.
    """
    ends: dict[str, ClientEnd] = {}

    def come() -> str | None:
        pauses = Pauses(float("inf"))  # the ends have a patience of their own
        try:
            for client in clients:
                end = ends[client] = network.client_end(client)
                while (found := end.look_for_run()) is None:
                    pauses.wait()
                if not isinstance(network, Sealed):
                    refuse_a_greeting_with_keys(found[2])
                end.enrol(b"")
        except EndedError as ended:
            if ended.is_finished:
                return str(ended)
            raise
        logger.info(f"{', '.join(clients)}: there is a coordinator, which knows now that we are here.")
        return None

    try:
        ending = told_by_first(come)
        return ClientProcess(site, ends, gate).run() if ending is None else ending
    finally:
        for end in ends.values():
            end.close()


class ClientProcess:
    """
    The clients of a site, one after the other on its one model. Of several processes of one launch the first talks,
    and all work.

    Args:
        site ([`Site`]):
            Does the work.
        ends (`Mapping[str, ClientEnd]`):
            By client; empty in all processes but the first.
        gate ([`Gate`], *optional*):
            What stands between it and the way out.
    """

    def __init__(self, site: Site, ends: Mapping[str, ClientEnd], gate: Gate | None = None) -> None:
        self._site, self._ends, self._gate = site, ends, gate
        self._pauses = Pauses(float("inf"))

    def run(self) -> str:
        """
        Take part until the run is over.

        Returns:
            `str`: How it has ended.

        Raises:
            EndedError: If the run was broken off, or its coordinator is gone.
            DeclinedError: If this site does not take part.
        """
        while True:
            message = told_by_first(self._next)
            if isinstance(message, str):
                return message
            answer, declined = self._answer(message)
            first_alone(functools.partial(self._reply, message, answer))
            if declined is not None:
                raise declined

    def _next(self) -> _Message | str:
        """The next message for any of the clients; how the run has ended, if it has."""
        self._pauses.restart()
        while True:
            for client, end in self._ends.items():
                try:
                    found = end.look()
                except EndedError as ended:
                    if ended.is_finished:
                        return str(ended)
                    raise
                if found is not None:
                    return _Message(client, *found)
            self._pauses.wait()

    def _answer(self, message: _Message) -> tuple[Packet, DeclinedError | None]:
        about: dict[str, Any] = {"client": message.client}
        try:
            if isinstance(message.content, str):
                raise ValueError(message.content)
            packet = Packet.from_bytes(message.content)
            if packet.kind != "invite" and packet.meta.get("client") != message.client:
                raise ValueError("it is for another client")
        except ValueError as damage:
            logger.warning(f"A message to client {message.client!r} cannot be read: {damage}")
            return Packet("failed", {}, {**about, "reason": str(damage), "is_damaged": True}), None
        about["round"] = packet.meta.get("round")
        try:
            return self._act(message.client, packet), None
        except DeclinedError as declined:
            return Packet("failed", {}, {**about, "reason": str(declined)}), declined
        except TurnFailedError as failure:
            return Packet("failed", {}, {**about, "reason": str(failure), "seconds": failure.seconds}), None
        except Exception as error:
            logger.warning(f"Client {message.client!r}, {packet.kind}: {error}", exc_info=True)
            reason = public_reason(error)
            # nobody would send anything to a process that could not get ready
            ends = DeclinedError(f"This client could not get ready: {reason}") if packet.kind == "invite" else None
            return Packet("failed", {}, {**about, "reason": reason}), ends

    def _act(self, client: str, packet: Packet) -> Packet:
        if packet.kind == "invite":
            return self._site.accept(client, packet)
        if packet.kind == "train":
            return self._site.turn(packet)
        if packet.kind == "evaluate":
            return self._site.evaluate(packet)
        raise ClientError(f"it was sent a message of the kind {packet.kind[:40]!r}, which it does not know")

    def _reply(self, message: _Message, answer: Packet) -> None:
        if self._gate is not None:
            answer = self._let_out(self._gate, message.client, answer)
        content = answer.to_bytes()
        if self._gate is not None:
            self._gate.sent(message.client, len(content))
        self._ends[message.client].reply(message.number, content)
        logger.info(_in_words(message.client, answer, len(content)))

    @staticmethod
    def _let_out(gate: Gate, client: str, answer: Packet) -> Packet:
        try:
            return gate.out(client, answer)
        except ClientError as refusal:
            logger.warning(f"Client {client!r}: {refusal}")
            about = {"client": client, "round": answer.meta.get("round"), "reason": str(refusal)}
            return gate.out(client, Packet("failed", {}, about))


def _in_words(client: str, answer: Packet, num_bytes: int) -> str:
    """What a client has sent, for its own log."""
    round, sent = answer.meta.get("round"), f"sent {num_bytes:,} bytes"
    if answer.kind == "joined":
        return f"Client {client!r} takes part."
    if answer.kind == "metrics":
        return f"Client {client!r} has evaluated what round {int(round or 1) - 1} has led to, and {sent}."
    if answer.kind == "update":
        loss = answer.meta["figures"].get("train_loss")
        return f"Client {client!r} has trained in round {round} (loss {loss}), and {sent}."
    return f"Client {client!r} has answered that nothing came of it: {answer.meta.get('reason')}"
