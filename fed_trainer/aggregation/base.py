# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from ..adapter_state import AdapterState


__all__ = ["Aggregator", "ClientUpdate"]


@dataclass
class ClientUpdate:
    """
    What a client sends back after a local round.

    Args:
        client (`str`):
            Name of the client.
        num_examples (`int`):
            Number of training examples the client holds.
        delta (`dict[str, torch.Tensor]`):
            Local minus global adapter, keyed as PEFT saves it.
        metrics (`dict[str, float]`):
            Figures for the record; no aggregation reads them.
    """

    client: str
    num_examples: int
    delta: AdapterState
    metrics: dict[str, float] = field(default_factory=dict)


class Aggregator(Protocol):
    """Turns the updates of one round into one; takes them one at a time, so memory does not grow with their number."""

    def begin(self, state: AdapterState) -> None:
        """Start a round from the global adapter `state`."""
        ...

    def add(self, update: ClientUpdate) -> None:
        """Take one client's update; it may be freed afterwards."""
        ...

    def finish(self) -> AdapterState:
        """The aggregated delta of the round, in float32."""
        ...
