# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The loop over rounds, on the server's side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from transformers.utils import logging

from ..config import FederationArguments, round_lr_factors
from ..output.timing import timed
from ..state.adapter_state import AdapterState
from ..state.low_rank import LowRank
from .broken_state import BrokenStateError
from .movement import Movement
from .packet import Packet, Reply
from .sampling import ClientSampler
from .server import Server
from .transport import Transport


__all__ = ["Federation", "Host", "Round"]

logger = logging.get_logger(__name__)


@dataclass
class Round:
    """
    What came of a round, beside the new state.

    Args:
        number (`int`):
            From 1.
        lr_factor (`float`):
            Factor on the learning rate.
        clients (`dict[str, dict[str, Any]]`):
            Figures of the clients whose update counts, with `num_examples`, `bytes_down` and `bytes_up`.
        refused (`dict[str, str]`):
            Why the others were left out.
        in_vain (`dict[str, int]`):
            `bytes_down` and `bytes_up` of these.
        base_change_bytes (`int`):
            Bytes of what was added to base weights.
        seconds (`dict[str, float]`):
            What the round took, by phase.
    """

    number: int
    lr_factor: float
    clients: dict[str, dict[str, Any]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    in_vain: dict[str, int] = field(default_factory=lambda: {"bytes_down": 0, "bytes_up": 0})
    base_change_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


class Host(Protocol):
    """Where a federation runs: it holds a model that the global state is tried on, and writes down what happens."""

    def before_round(self, round: int) -> None:
        """What has to be in order before the first client of a round. What fails here is no client's fault."""

    def after_client(self, round: Round, client: str) -> None:
        """A client's update counts."""

    def install(self, state: AdapterState, base_change: dict[str, LowRank]) -> None:
        """
        Take over a new global state.

        Raises:
            BrokenStateError: If the model cannot compute with it.
        """

    def settle(self, counted: Mapping[str, int | None]) -> None:
        """
        The new state holds. A client learns the verdict on its update from its next packet; what is in this process
        may know it at once.

        Args:
            counted (`Mapping[str, int]`):
                By client of the round the last round in which its update counted.
        """

    def uninstall(self) -> None:
        """Go back to what there was before the last `install`."""

    def evaluate(self, round: Round) -> Mapping[str, Any] | None:
        """
        Evaluate the global model, if it is due.

        Raises:
            BrokenStateError: If the model cannot compute with it.
        """

    def finish_round(self, round: Round, evaluation: Mapping[str, Any] | None) -> bool:
        """Report, save and publish what is due; whether the run is to go on."""


class Federation:
    """
    The rounds of a federation. The server's side: it knows no model and no data.

    Args:
        args ([`FederationArguments`]):
            The settings.
        server ([`Server`]):
            The server's side of a round.
        sampler ([`ClientSampler`]):
            Which clients a round has.
        transport ([`Transport`]):
            How packets get to them.
        host ([`Host`]):
            Where it runs.
        state (`dict[str, torch.Tensor]`):
            The global state before the first round; nothing changes it in place.
    """

    def __init__(
        self,
        args: FederationArguments,
        server: Server,
        sampler: ClientSampler,
        transport: Transport,
        host: Host,
        state: AdapterState,
    ) -> None:
        self.args, self.server, self.sampler, self.transport, self.host = args, server, sampler, transport, host
        self.state = state
        self.done = 0
        """Rounds that have come to their end."""
        self._movement = Movement()

    def restart(self, state: AdapterState) -> None:
        """Begin before the first round."""
        self.state, self.done = state, 0
        self.server.restart()
        self._movement = Movement()

    def go_on(self, state: AdapterState, done: int) -> None:
        """Continue after round `done`; the server has been loaded."""
        self.state, self.done = state, done
        self._movement = Movement(has_begun=True)

    def run(self) -> None:
        """
        All rounds that remain, or those until the host stops.

        Raises:
            NothingTrainedError: If no client has changed anything of what it trains.
            TooFewClientsError: If fewer updates of a round can be used than it needs.
            BrokenStateError: If the model cannot compute with the new state; the one before holds.
            NotImplementedError: If the method changes base weights, of which the clients elsewhere would not learn.
        """
        if self.server.plan.method.moves_base and not self.transport.shares_base:
            raise NotImplementedError(
                f"`aggregation={self.args.aggregation!r}` changes base weights, which {type(self.transport).__name__} "
                "does not take to the clients. Use 'fedavg', or train all clients in this process."
            )
        lr_factors = round_lr_factors(self.args)  # `num_rounds` may have been raised since
        for number in range(self.done + 1, self.args.num_rounds + 1):
            round = Round(number, lr_factors[number - 1])
            self.host.before_round(number)
            self._collect(round)
            before = self.state
            try:
                self._finish(round)
                evaluation = self.host.evaluate(round)
            except BrokenStateError:
                self.state = before
                self.host.uninstall()
                raise
            self.done = number
            if not self.host.finish_round(round, evaluation):
                break

    def _collect(self, round: Round) -> None:
        """Send the clients of the round their packets, and take what comes back into account."""
        sampled = self.sampler.sample(round.number)
        self.server.begin(self.state, round.number, sampled)
        self._movement.begin()
        packets = Packets(self.server, sampled, round.lr_factor)
        silent = set(sampled)
        for reply in self.transport.exchange(packets, round.number, self.args.client_timeout):
            silent.discard(reply.client)
            self._take(round, reply)
        for client in sorted(silent):
            self._take(round, Reply(client, "lost"))
        round.refused = self.server.refused
        self._movement.end(round.number)

    def _take(self, round: Round, reply: Reply) -> None:
        for phase, seconds in reply.seconds.items():
            round.seconds[phase] = round.seconds.get(phase, 0.0) + seconds
        with timed(round.seconds, "aggregate"):
            reason = self.server.receive(reply)
        if reason is None:
            self._count(round, reply, self.server.traffic[reply.client])
            return
        logger.warning(f"Round {round.number} goes on without client {reply.client!r}: {reason}")
        if reply.client not in round.clients:  # one that has answered twice has counted once
            for direction, size in self.server.traffic.get(reply.client, {}).items():
                round.in_vain[direction] += size

    def _count(self, round: Round, reply: Reply, traffic: Mapping[str, int]) -> None:
        assert reply.packet is not None
        meta = reply.packet.meta
        self._movement.saw(reply.client, bool(meta.get("moved", True)), bool(meta.get("has_rate", True)))
        counted = {"num_examples": meta["num_examples"], **traffic}  # over figures of these names
        round.clients[reply.client] = {"num_examples": None, **meta["figures"], **counted}
        self.host.after_client(round, reply.client)

    def _finish(self, round: Round) -> None:
        with timed(round.seconds, "aggregate"):
            state, base_change = self.server.finish()
            self.host.install(state, base_change)
            self.state = state
            self.host.settle(self.server.settle())  # last: clients keep nothing of a round that has broken the model
            round.base_change_bytes = self.server.base_change_bytes


class Packets(Mapping[str, Packet]):
    """The packets of a round, each made when it is looked up."""

    def __init__(self, server: Server, clients: list[str], lr_factor: float) -> None:
        self._server, self._clients, self._lr_factor = server, clients, lr_factor

    def __getitem__(self, client: str) -> Packet:
        return self._server.packet_for(client, self._lr_factor)

    def __iter__(self) -> Iterator[str]:
        return iter(self._clients)

    def __len__(self) -> int:
        return len(self._clients)
