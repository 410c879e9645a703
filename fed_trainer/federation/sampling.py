# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Which clients train in a round, and with what seed."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from numbers import Integral

import numpy as np


__all__ = ["ClientSampler", "client_seed"]


class ClientSampler:
    """
    Uniform sampling without replacement, a pure function of seed and round: a resumed run samples the same clients.

    Args:
        clients (`Sequence[str]`):
            Names of all clients.
        clients_per_round (`int` or `float`, *optional*):
            A number of clients (`int`) or a fraction of them (`float`, at most `1.0`; rounded, at least one client).
            All if `None`.
        seed (`int`):
            Seed of the run.

    Raises:
        ValueError: If more clients are asked for than there are.
    """

    def __init__(self, clients: Sequence[str], clients_per_round: int | float | None, seed: int) -> None:
        self.clients = sorted(clients)
        self.seed = seed
        if clients_per_round is None:
            self.num_sampled = len(self.clients)
        elif isinstance(clients_per_round, Integral) or clients_per_round > 1:
            self.num_sampled = int(clients_per_round)
        else:
            self.num_sampled = max(1, round(clients_per_round * len(self.clients)))
        if self.num_sampled > len(self.clients):
            raise ValueError(
                f"`clients_per_round` is {clients_per_round}, but there are only {len(self.clients)} clients. Set "
                f"it to at most {len(self.clients)}, or leave it out to train all of them in every round."
            )

    def sample(self, round: int) -> list[str]:
        """Names of the clients of a round, in sorted order."""
        generator = np.random.default_rng([self.seed, round])
        chosen = generator.choice(len(self.clients), size=self.num_sampled, replace=False)
        return [self.clients[index] for index in sorted(chosen)]


def client_seed(seed: int, round: int, client: str) -> int:
    """Seed of one client's local round (32 bits), independent of which other clients take part and of their order."""
    return int(np.random.SeedSequence([seed, round, zlib.crc32(client.encode())]).generate_state(1)[0])
