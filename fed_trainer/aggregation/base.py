# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from ..adapter_state import AdapterState
from .low_rank import LowRank


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
            Local adapter minus what the client was sent, keyed as PEFT saves it.
        metrics (`dict[str, float]`):
            Figures for the record; no aggregation reads them.
        num_steps (`int`, *optional*):
            Number of local optimiser steps, for [`FedNova`].
        scalings (`dict[str, float]`, *optional*):
            The client's own `lora_alpha / r` by module, where its rank and therefore its scaling is not the server's.
        base_digest (`str`, *optional*):
            [`base_digest`] of the base model the client trained on.
    """

    client: str
    num_examples: int
    delta: AdapterState
    metrics: dict[str, float] = field(default_factory=dict)
    num_steps: int | None = None
    scalings: dict[str, float] | None = None
    base_digest: str | None = None


class Aggregator(ABC):
    """
    Turns the updates of one round into one; takes them one at a time, so memory need not grow with their number.

    A rule sees only what is shared (see [`TensorRoles`]).
    """

    @abstractmethod
    def begin(self, state: AdapterState, round: int = 1) -> None:
        """Start round number `round` from the global adapter `state`, dropping what an abandoned round left."""

    @abstractmethod
    def add(self, update: ClientUpdate) -> None:
        """Take one client's update."""

    @abstractmethod
    def finish(self) -> AdapterState:
        """The aggregated delta of the round, in float32."""

    @property
    def min_updates(self) -> int:
        """The least number of updates the rule can work with; rules that bear arbitrary clients need more than one."""
        return 1

    @property
    def base_change(self) -> dict[str, LowRank]:
        """
        After `finish`: what the rule adds to base weights, by module, as factors `left (out, k)`, `right (k, in)` with
        the scaling in them. Empty for most rules.
        """
        return {}
