# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

from ..packet import Packet, Reply


__all__ = ["Transport"]


class Transport(ABC):
    """
    Carries the packets of a round to clients, and their answers back.

    Attributes:
        shares_base (`bool`):
            Whether the base model of the clients is the server's own: what is added to it is not in a packet.
    """

    shares_base: bool = False

    @abstractmethod
    def exchange(self, packets: Mapping[str, Packet], round: int, timeout: float | None = None) -> Iterator[Reply]:
        """
        Send every client its packet.

        Args:
            packets (`Mapping[str, Packet]`):
                By client; a packet may be made when it is looked up.
            round (`int`):
                Number of the round, from 1.
            timeout (`float`, *optional*):
                Seconds after which a client that has not answered is given up.

        Yields:
            [`Reply`]: Exactly one per client, in any order, as they come in: the server's memory does not grow with
            them.
        """
