# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""A trainer as the site of a federation between machines."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..client.invitations import check_run, versions
from ..client.process import DeclinedError, Gate, take_part
from ..client.store import PRIVATE_FOLDER, ClientStore
from ..client.turn import Client
from ..federation.packet import Packet
from ..federation.transport.ends import Network
from ..output.record import client_sizes
from .serving import ADAPTER, REFERENCE


__all__ = ["TakingPart"]


class TakingPart:
    """
    The clients of a site: a [`Site`] of a [`ClientProcess`].

    Args:
        trainer ([`FederatedMixin`]):
            The trainer.
        network ([`Network`]):
            Where the coordinator is met.
        clients (`Sequence[str]`):
            The names of the clients of this process.
        gate ([`Gate`], *optional*):
            What stands between this process and the way out.
    """

    def __init__(self, trainer: Any, network: Network, clients: Sequence[str], gate: Gate | None = None) -> None:
        self._trainer, self._network, self._clients, self._gate = trainer, network, list(clients), gate

    def run(self) -> str:
        """
        Take part until the run is over; returns how it has ended.

        Raises:
            EndedError: If it was broken off, or nobody serves.
            DeclinedError: If this site does not take part.
        """
        return take_part(self, self._network, self._clients, self._gate)

    # What a site does

    def accept(self, client: str, invitation: Packet) -> Packet:
        """Get ready for the run of an invitation."""
        trainer = self._trainer
        try:
            if self._gate is not None:
                self._gate.check(invitation.meta, client, len(trainer._clients[client]), trainer.args.world_size)
            check_run(trainer, invitation, invitation.part(ADAPTER), client)
            self._found(invitation)
        except DeclinedError:
            raise
        except (ValueError, NotImplementedError) as error:
            raise DeclinedError(str(error)) from error
        sizes = client_sizes({client: trainer._clients[client]}, trainer.args.label_column)[client]
        about = {
            "client": client,
            "num_examples": sizes["num_examples"],
            "label_counts": sizes["composition"],
            "has_held_out": trainer.evaluates_clients and client in trainer.eval_dataset,
            "versions": versions(),
        }
        return Packet("joined", {}, about)

    def _found(self, invitation: Packet) -> None:
        """The clients' side of the run, with the coordinator's adapter."""
        trainer, run = self._trainer, invitation.meta
        if trainer._base_changes is not None:
            trainer._base_changes.reset()  # the adapter is relative to the untouched base
        trainer._live_adapter.load(invitation.part(ADAPTER), "The adapter of the coordinator")
        if reference := invitation.part(REFERENCE):
            trainer._load_reference(reference)
        start = trainer._shared_start({})
        known = set(trainer._clients) | set(run["settings"].get("client_settings") or {})
        plan = trainer._plan(start, sorted(known), run["num_clients"], run["num_sampled"])
        if plan.method.adds_to_base and len(self._clients) > 1:
            raise DeclinedError(
                f"`aggregation={trainer.args.aggregation!r}` adds to the base weights, which the {len(self._clients)} "
                "clients of this process share, so it would be added several times. Start a process for each."
            )
        # a folder for each run, under a name that is ours: what a coordinator says may be any path
        folder = (
            Path(trainer._files.folder) / PRIVATE_FOLDER / hashlib.sha256(str(run["run"]).encode()).hexdigest()[:16]
        )
        trainer._found(Client(trainer, plan, trainer._data, ClientStore(folder), start, is_elsewhere=True), start)
        trainer.client.base_changes = trainer._base_changes

    def turn(self, packet: Packet) -> Packet:
        """A client's turn."""
        answer: Packet = self._trainer.client.turn(packet)
        return answer

    def evaluate(self, packet: Packet) -> Packet:
        """A client's evaluation on its own held-out data."""
        answer: Packet = self._trainer.client.evaluate(packet)
        return answer
