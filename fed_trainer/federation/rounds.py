# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The loop over rounds, on the server's side."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from transformers.utils import logging

from ..config import FederationArguments, round_lr_factors
from ..methods.aggregation import Method
from ..output.figures import FIGURES_WITHHELD
from ..output.timing import timed
from ..state.adapter_state import AdapterState
from ..state.low_rank import LowRank
from .base_sum import BaseSum
from .broken_state import BrokenStateError
from .movement import Movement
from .packet import Packet, Reply
from .sampling import ClientSampler
from .server import Server
from .transport import Packets, Transport


__all__ = ["Federation", "Host", "Round", "refuse_trained_base"]

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
            Figures of the clients whose update counts, with `num_examples` (`None` if it may not leave the client),
            `bytes_down` and `bytes_up`; of a client whose figures may not, `figures_withheld` in their place.
        refused (`dict[str, str]`):
            Why the others were left out.
        in_vain (`dict[str, int]`):
            `bytes_down` and `bytes_up` of these, and of evaluations at clients.
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

    def base_sum(self) -> AdapterState:
        """What the rounds so far have added to base weights, as [`BaseSum`] takes it."""

    def is_evaluated_at_clients(self, round: int) -> bool:
        """Whether the state after a round (0: the start) is to be evaluated by the clients, on their own data."""

    def enter_evaluation(
        self, figures: dict[str, dict[str, Any]], num_examples: dict[str, int | None]
    ) -> Mapping[str, Any] | None:
        """
        Take over what clients have measured.

        Args:
            figures (`dict[str, dict[str, Any]]`):
                By client; empty for one that has given nothing.
            num_examples (`dict[str, int]`):
                By client that has given something the number of its held-out examples; `None` if it may not leave.

        Returns:
            `Mapping[str, Any]`: the evaluation, if there is one.
        """

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
        self._has_met = False  # the clients, since the run has begun or gone on
        self._before_first_round = 0  # bytes that were sent for an evaluation of the start

    def restart(self, state: AdapterState) -> None:
        """Begin before the first round."""
        self.state, self.done, self._has_met = state, 0, False
        self.server.restart()
        self._movement = Movement()

    def go_on(self, state: AdapterState, done: int) -> None:
        """Continue after round `done`; the server has been loaded."""
        self.state, self.done, self._has_met = state, done, False
        self._movement = Movement(has_begun=True)

    def run(self) -> None:
        """
        All rounds that remain, or those until the host stops.

        Raises:
            NothingTrainedError: If no client has changed anything of what it trains.
            TooFewClientsError: If fewer updates of a round can be used than it needs.
            BrokenStateError: If the model cannot compute with the new state; the one before holds.
            NotImplementedError: If the method trains base weights, of which clients elsewhere would not learn.
        """
        self._meet_clients()
        lr_factors = round_lr_factors(self.args)  # `num_rounds` may have been raised since
        for number in range(self.done + 1, self.args.num_rounds + 1):
            round = Round(number, lr_factors[number - 1])
            self.host.before_round(number)
            self._collect(round)
            before = self.state
            try:
                self._finish(round)
                evaluation = self.host.evaluate(round)
                if evaluation is None:
                    evaluation = self.evaluate_at_clients(round)
            except BrokenStateError:
                self.state = before
                self.host.uninstall()
                raise
            self.done = number
            if not self.host.finish_round(round, evaluation):
                break

    def _meet_clients(self) -> None:
        """
        Clients elsewhere have a base of their own, and may have been sent rounds that no longer hold, by an earlier
        process.
        """
        if self.transport.shares_base or self._has_met:
            return
        self._has_met = True
        method = self.server.plan.method
        refuse_trained_base(method, self.args.aggregation, type(self.transport).__name__)
        self.server.visits.meets_anew()
        if method.adds_to_base:
            self.server.base_sum = BaseSum(self.host.base_sum)

    def evaluate_at_clients(self, round: Round) -> Mapping[str, Any] | None:
        """Let the clients evaluate the state after a round, if that is due; all that have held-out data."""
        if not self.host.is_evaluated_at_clients(round.number):
            return None
        self._meet_clients()
        figures: dict[str, dict[str, Any]] = {}
        counts: dict[str, int | None] = {}
        with timed(round.seconds, "evaluate"):
            self.server.begin(self.state, round.number + 1, [])
            make = functools.partial(self._evaluation_packet, round)
            packets = Packets(make, self.server.visits, self.transport.evaluators)
            for reply in self.transport.exchange(packets, round.number + 1, self.args.client_timeout):
                measured = self._measured(reply)
                figures[reply.client], counts[reply.client] = measured or ({}, 0)
                if measured is None:
                    self.server.visits.meets_anew(reply.client)  # whether it has taken over the packet is not known
                    reason = reply.reason or f"it has not answered ({reply.status})"
                    logger.warning(f"Client {reply.client!r} has not evaluated round {round.number}: {reason}")
                else:
                    self.server.visits.seen[reply.client] = round.number + 1
        return self.host.enter_evaluation(figures, counts)

    def _evaluation_packet(self, round: Round, client: str) -> Packet:
        packet = self.server.evaluation_packet_for(client)
        if round.number == 0:  # before the first round, to which it is added
            self._before_first_round += packet.num_bytes
        else:
            round.in_vain["bytes_down"] += packet.num_bytes
        return packet

    @staticmethod
    def _measured(reply: Reply) -> tuple[dict[str, Any], int | None] | None:
        """The figures of an evaluation and the number of examples, if it has come to that."""
        packet = reply.packet
        if packet is None or packet.kind != "metrics":
            return None
        metrics, count = packet.meta.get("metrics"), packet.meta.get("num_examples")
        if not isinstance(metrics, dict) or FIGURES_WITHHELD in metrics:
            return None
        if count is not None and (type(count) is not int or not 1 <= count <= 2**53):
            return None
        return {key: value for key, value in metrics.items() if isinstance(value, (bool, int, float, str))}, count

    def _collect(self, round: Round) -> None:
        """Send the clients of the round their packets, and take what comes back into account."""
        sampled = self.sampler.sample(round.number)
        self.server.begin(self.state, round.number, sampled)
        self._movement.begin()
        make = functools.partial(self.server.packet_for, lr_factor=round.lr_factor)
        packets = Packets(make, self.server.visits, sampled)
        silent = set(sampled)
        for reply in self.transport.exchange(packets, round.number, self.args.client_timeout):
            silent.discard(reply.client)
            self._take(round, reply)
        for client in sorted(silent):
            self._take(round, Reply(client, "lost"))
        round.refused = self.server.refused
        round.in_vain["bytes_down"] += self._before_first_round
        self._before_first_round = 0
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
        counted = {"num_examples": meta.get("num_examples"), **traffic}  # over figures of these names
        round.clients[reply.client] = {"num_examples": None, **meta["figures"], **counted}
        self.host.after_client(round, reply.client)

    def _finish(self, round: Round) -> None:
        with timed(round.seconds, "aggregate"):
            state, base_change = self.server.finish()
            self.host.install(state, base_change)
            self.state = state
            self.host.settle(self.server.settle())  # last: clients keep nothing of a round that has broken the model
            round.base_change_bytes = self.server.base_change_bytes


def refuse_trained_base(method: Method, name: str, transport: str) -> None:
    """
    Refuse a method whose first stage clients elsewhere could not take part in.

    Args:
        method ([`Method`]):
            The method.
        name (`str`), transport (`str`):
            Its name, and that of what would take it to the clients.

    Raises:
        NotImplementedError: If it trains base weights.
    """
    if method.trains_base:
        raise NotImplementedError(
            f"`aggregation={name!r}` trains base weights in a first stage, which {transport} does not take to the "
            "clients. Use 'fedavg', or train all clients in one process."
        )
