# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from ...state.client_errors import TurnFailedError
from ..packet import Packet, Reply
from .base import Packets, Transport


__all__ = ["InProcess"]


class TakesTurns(Protocol):
    """The clients' side in this process."""

    def turn(self, packet: Packet) -> Packet:
        """
        A client's turn.

        Raises:
            TurnFailedError: For a turn that has failed; any other exception is no client's fault and ends the round.
        """


class InProcess(Transport):
    """
    The clients are here: each has its turn when its packet is taken, one after the other in the order of the packets.
    Nothing is copied. Several processes of one launch take all turns together.

    Args:
        client ([`TakesTurns`]):
            Takes the turns of all of them.
    """

    shares_base = True

    def __init__(self, client: TakesTurns) -> None:
        self._client = client

    def exchange(self, packets: Packets, round: int, timeout: float | None = None) -> Iterator[Reply]:
        """As [`Transport.exchange`]; `timeout` is that of the local rounds, which see to it themselves."""
        for client in packets:
            try:
                answer = self._client.turn(packets[client])
                reply = Reply(client, packet=answer, seconds=answer.meta["seconds"])
            except TurnFailedError as failure:
                reply = Reply(client, "error", reason=str(failure), seconds=failure.seconds)
            yield reply
