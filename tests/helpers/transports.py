# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Transports that leave of the process nothing but packets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fed_trainer.federation.packet import Packet, Reply
from fed_trainer.federation.transport import InProcess


class Elsewhere:
    """The clients as on another machine: in their turns there is no server."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.client = trainer, trainer.client

    def turn(self, packet: Packet) -> Packet:
        federation = self.trainer.federation
        del self.trainer.federation
        try:
            return self.client.turn(packet)
        finally:
            self.trainer.federation = federation


class OverBytes(InProcess):
    """As between machines: what arrives has been bytes."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(Elsewhere(trainer))

    def exchange(self, packets: Mapping[str, Packet], round: int, timeout: float | None = None) -> Iterator[Reply]:
        arrived = {client: Packet.from_bytes(packets[client].to_bytes()) for client in packets}
        for reply in super().exchange(arrived, round, timeout):
            packet = None if reply.packet is None else Packet.from_bytes(reply.packet.to_bytes())
            yield Reply(reply.client, reply.status, packet, reply.reason, reply.seconds)
