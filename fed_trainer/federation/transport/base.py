# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence

from ..packet import Packet, Reply
from ..visits import Visits


__all__ = ["Packets", "Transport"]


class Packets(Mapping[str, Packet]):
    """
    The packets of a round, each made when it is looked up.

    Args:
        make (`Callable`):
            Makes the packet of a client.
        visits ([`Visits`]):
            What the server remembers of the clients.
        clients (`Sequence[str]`):
            Their names.
    """

    def __init__(self, make: Callable[[str], Packet], visits: Visits, clients: Sequence[str]) -> None:
        self._make, self._visits, self._clients = make, visits, clients

    def __getitem__(self, client: str) -> Packet:
        return self._make(client)

    def anew(self, client: str) -> Packet:
        """The packet for a client whose process has begun anew, so that nothing it was sent is there any more."""
        self._visits.meets_anew(client)
        return self._make(client)

    def __contains__(self, client: object) -> bool:
        return client in self._clients  # that of `Mapping` would make the packet

    def __iter__(self) -> Iterator[str]:
        return iter(self._clients)

    def __len__(self) -> int:
        return len(self._clients)


class Transport(ABC):
    """
    Carries the packets of a round to clients, and their answers back.

    Attributes:
        shares_base (`bool`):
            Whether the base model of the clients is the server's own: what is added to it is not in a packet.
    """

    shares_base: bool = False

    @property
    def evaluators(self) -> list[str]:
        """The clients that have held-out data to evaluate on when they are sent a packet of that kind."""
        return []

    @abstractmethod
    def exchange(self, packets: Packets, round: int, timeout: float | None = None) -> Iterator[Reply]:
        """
        Send every client its packet.

        Args:
            packets ([`Packets`]):
                By client; a packet is made when it is looked up.
            round (`int`):
                Number of the round, from 1.
            timeout (`float`, *optional*):
                Seconds after which a client that has not answered is given up.

        Yields:
            [`Reply`]: Exactly one per client, in any order, as they come in: the server's memory does not grow with
            them.
        """
