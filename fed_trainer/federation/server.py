# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""The server's side of a round, without a model: what is sent, who counts, the rule, the step."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from transformers.utils import logging

from ..methods.aggregation import Aggregator, ClientUpdate
from ..methods.aggregation.limits import largest_product, product_limit, value_limits
from ..methods.objectives import ServerHalf
from ..methods.server_optimizers import ServerOptimizer
from ..output.figures import FIGURES_WITHHELD, TRAINING_METRICS
from ..state.adapter_state import AdapterState, state_bytes
from ..state.client_errors import ClientError
from ..state.factors import FactorPair
from ..state.low_rank import LowRank
from ..state.processes import from_first, is_first
from .base_sum import BaseSum
from .broken_state import WAY_BACK, BrokenStateError
from .client_settings import ClientSettings
from .packet import BASE, DELTA, DRAWN, EXTRAS, OBJECTIVE, STATE, Packet, Reply, named
from .plan import Plan
from .validation import InvalidUpdateError, first_not_finite, require_clients, validated
from .visits import Visits


__all__ = ["Server"]

logger = logging.get_logger(__name__)

PLAIN = ServerOptimizer()


class Server:
    """
    What the server does in a round: `begin`, `packet_for` and `receive` once per client, `finish`.

    Args:
        plan ([`Plan`]):
            What the settings imply.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.rule, self.optimizer = plan.rule, plan.optimizer
        self.objective = ServerHalf() if plan.objective is None else plan.objective.server_half()
        self.visits = Visits()
        self.base_sum: BaseSum | None = None
        """What goes into base weights, if clients have to be sent it, as they are elsewhere."""
        self.taken: list[str] = []
        self.refused: dict[str, str] = {}
        self.base_change_bytes = 0
        self.traffic: dict[str, dict[str, int]] = {}
        """By client of the round the bytes of what it was sent and what it has sent."""

    # A round

    def begin(self, state: AdapterState, round: int, sampled: Collection[str] | None = None) -> None:
        """
        Start a round.

        Args:
            state (`dict[str, torch.Tensor]`):
                The global state: all that is trained, whatever its role.
            round (`int`):
                Number of the round, from 1.
            sampled (`Collection[str]`, *optional*):
                Clients of the round; an update of another one is refused. Any if not given.
        """
        rounds = range(max(1, round - 2), round + 1)
        self._shared_in = {number: self.plan.shared_keys(state, number) for number in rounds}
        self._round, self.state = round, state
        self._sampled = None if sampled is None else set(sampled)
        self._faulty: set[str] = set()  # clients whose update was refused
        self._answered: set[str] = set()  # to the packet of this round, whatever came of their turns
        self._shared = {key: tensor for key, tensor in state.items() if key in self._shared_in[round]}
        self.rule.begin(self._shared, round)
        self.objective.begin_round()
        self._limits = value_limits(self._shared, self.rule.largest_value(self._shared), self.plan.buffers)
        self._product_limits = self._limits_of_products()
        self._cut: dict[int | None, AdapterState] = {}  # by rank
        self._on_the_wire: dict[int | None, AdapterState] = {}
        self.taken, self.refused, self.traffic = [], {}, {}

    def settings_of(self, client: str) -> ClientSettings:
        """What the client does differently, with the rank that it has by now."""
        return self.plan.settings_of(client, self.objective.rank_of(client))

    def packet_for(self, client: str, lr_factor: float = 1.0) -> Packet:
        """
        What a client is sent in the round that has begun: the tensors that have changed since it last answered, cut
        to its rank, also those of layers that it does not train, as it computes with them.

        Args:
            client (`str`):
                Its name.
            lr_factor (`float`, *optional*, defaults to `1.0`):
                Factor on the learning rate in this round.
        """
        settings = self.settings_of(client)
        sent = self._sent_to(settings)
        tensors, meta = self._state_for(client, settings)
        along = self.objective.to_client(client)
        packet = Packet(
            "train",
            {
                **tensors,
                **named(OBJECTIVE, {key: along[key] for key in along if key in sent and settings.trains(key)}),
            },
            {
                "round": self._round,
                "client": client,
                "lr_factor": lr_factor,
                "counted": self.visits.counted.get(client),
                "saved": self.visits.saved.get(client),
                "rank": settings.r,
                **meta,
            },
        )
        before = self.traffic.get(client, {}).get("bytes_down", 0)  # to a client that had to begin again
        self.traffic[client] = {"bytes_down": before + packet.num_bytes}
        return packet

    def evaluation_packet_for(self, client: str) -> Packet:
        """
        What a client is sent to evaluate the state that the round begins with: what it does not have of it, and will
        not be sent again for its turn.
        """
        settings = self.settings_of(client)
        tensors, meta = self._state_for(client, settings)
        counted, saved = self.visits.counted.get(client), self.visits.saved.get(client)
        about = {"round": self._round, "client": client, "counted": counted, "saved": saved, "rank": settings.r}
        return Packet("evaluate", tensors, {**about, **meta})

    def _state_for(self, client: str, settings: ClientSettings) -> tuple[AdapterState, dict[str, Any]]:
        """Of the state that the round begins with what a client does not have, and what a packet says of it."""
        sent, drawn, seen = self._sent_to(settings), self.plan.drawn_keys, self.visits.seen.get(client)
        changed = self.changed_since(seen)
        states = {key: sent.get(key, tensor) for key, tensor in self.state.items() if key in changed}
        tensors = {
            **named(STATE, self._encoded({key: t for key, t in states.items() if key not in drawn}, settings)),
            **named(DRAWN, {key: tensor for key, tensor in states.items() if key in drawn}),
        }
        if self.base_sum is None:
            return tensors, {"base_bytes": self.visits.missed_bytes(client)}
        factors, what = self.base_sum.for_client(seen, self._round)
        return {**tensors, **named(BASE, factors)}, {"base_is": what}

    def _encoded(self, state: AdapterState, settings: ClientSettings) -> AdapterState:
        """As it is sent: the same tensors to all clients of a rank."""
        cache = self._on_the_wire.setdefault(settings.r, {})
        cache |= self.plan.down.encode({key: tensor for key, tensor in state.items() if key not in cache})
        return {key: cache[key] for key in state}

    def _sent_to(self, settings: ClientSettings) -> AdapterState:
        """The shared tensors as a client with these settings knows them."""
        if settings.r not in self._cut:
            self._cut[settings.r] = self.plan.cut_to_rank(self._shared, settings)
        return self._cut[settings.r]

    def changed_since(self, round: int | None) -> set[str]:
        """
        Names of the tensors that have changed since a client came to round number `round`; for a client that has not
        been here (`None`) all that is or was shared. Roles repeat every two rounds at most.
        """
        first = 1 if round is None else round
        now = self._shared_in[self._round] if round is None else set()
        return now.union(*(keys for number, keys in self._shared_in.items() if first <= number < self._round))

    def asked_of(self, client: str) -> AdapterState:
        """What a client is to send an update of, as it has been sent."""
        settings = self.settings_of(client)
        return self.plan.asked_of(self._sent_to(settings), settings)

    def receive(self, reply: Reply) -> str | None:
        """
        Take the answer of a client into account. Whatever came in, nothing is raised.

        Args:
            reply ([`Reply`]):
                What came of its packet.

        Returns:
            `str` or `None`: why it is left out, if it is.
        """
        if reply.status == "error" or self._is_answered(reply):
            self._answered.add(reply.client)
        if (reason := self._fault_of_answer(reply)) is not None:
            self.refused[reply.client] = reason
            return reason
        assert reply.packet is not None
        packet, meta = reply.packet, reply.packet.meta
        self.traffic.setdefault(reply.client, {})["bytes_up"] = packet.num_bytes
        asked = self.asked_of(reply.client)
        try:
            delta = self.plan.up.decode(packet.part(DELTA), asked)
        except Exception as error:  # whatever tensors of somebody else's lead a codec to
            delta = None
            logger.warning(f"The update of client {reply.client!r} cannot be decoded.", exc_info=error)
        update = ClientUpdate(
            reply.client,
            meta.get("num_examples"),
            delta,  # type: ignore[arg-type]  # what is none is refused with all else that is no update
            meta["figures"],
            num_steps=meta.get("num_steps"),
            base_digest=meta.get("base_digest"),
            num_tokens=meta.get("num_tokens"),
            extras=packet.part(EXTRAS),
        )
        return self.take(update, asked)

    def _is_answered(self, reply: Reply) -> bool:
        """Whether its packet is an answer to that of this round."""
        if reply.packet is None:
            return False
        meta, asked = reply.packet.meta, ("update", self._round, reply.client)
        return (reply.packet.kind, meta.get("round"), meta.get("client")) == asked

    def _fault_of_answer(self, reply: Reply) -> str | None:
        """Why there is no update to look at, if there is none."""
        if reply.packet is None:
            return reply.reason or f"it has not answered ({reply.status})"
        if not self._is_answered(reply):
            return "its answer is to another packet than that of this round. Send one answer to each."
        figures = reply.packet.meta.get("figures")
        if figures == {FIGURES_WITHHELD: True}:
            return None
        loss = figures.get("train_loss") if isinstance(figures, dict) else None
        if isinstance(loss, bool) or not isinstance(loss, (int, float)):
            return "its figures have no `train_loss`, which is a number. Send what the local round has given."
        assert isinstance(figures, dict)
        if not isinstance(figures.get(TRAINING_METRICS, {}), dict):
            return f"its `{TRAINING_METRICS}` are no figures by name. Send what the local round has given."
        return None

    def take(self, update: ClientUpdate, asked: AdapterState) -> str | None:
        """
        Take an update into account. Whatever came in, nothing is raised.

        Args:
            update ([`ClientUpdate`]):
                What came in.
            asked (`dict[str, torch.Tensor]`):
                `asked_of` the client.

        Returns:
            `str` or `None`: why it is left out, if it is.
        """
        sends = {} if self.plan.objective is None else self.plan.objective.sends
        try:
            update = validated(
                update,
                asked,
                self.taken,
                self.plan.facts.base_digest,
                sampled=self._sampled,
                limits=self._limits,
                most_steps=self.plan.most_steps,
                sends=sends,
                numbers=self.rule.numbers,
            )
            trained = {key: tensor for key, tensor in update.delta.items() if key not in self.plan.buffers}
            if (fault := self._fault_of(update, trained)) is not None:
                raise InvalidUpdateError(update.client, fault)
        except InvalidUpdateError as error:
            client, is_known = error.client, self._sampled is None or error.client in self._sampled
            if is_known and client not in self.taken:
                self._faulty.add(client)
            self.refused[client if is_known else ascii(client)[:80]] = error.reason
            return error.reason
        if is_first():
            self.rule.add(update)
        self.objective.accept(update.client, update.extras, trained)
        self.taken.append(update.client)
        self._faulty.discard(update.client)
        return None

    def _fault_of(self, update: ClientUpdate, trained: AdapterState) -> str | None:
        """What the rule or the local objective could not compute with, in an update that is valid in itself."""
        try:
            self.rule.check(update)
        except ValueError as error:
            return str(error)
        for pair in self.plan.pairs if self.plan.method.uses_pairs else ():
            if pair.key_A in update.delta and pair.key_B in update.delta:
                A, B = self._factors_of(pair, update.delta)
                size, limit = largest_product(pair.scaling, A, B), self._product_limits[pair.module]
                if not size <= limit:
                    return (
                        f"the product of its factors of {pair.module} may reach {size:.3g}, beyond {limit:.3g}, "
                        "beside which the base weight would not count, or which it cannot hold. Lower `learning_rate`."
                    )
        return self.objective.fault_of(update.extras, trained)

    def _factors_of(self, pair: FactorPair, delta: AdapterState) -> tuple[torch.Tensor, torch.Tensor]:
        """What a client ended with."""
        delta_A, delta_B = delta[pair.key_A], delta[pair.key_B]
        rank = len(delta_A)
        A, B = self._shared[pair.key_A][:rank].float() + delta_A, self._shared[pair.key_B][:, :rank].float() + delta_B
        return pair.whole(A, B)

    def _limits_of_products(self) -> dict[str, float]:
        limits = {}
        for pair in self.plan.pairs:
            if pair.key_A in self._shared and pair.key_B in self._shared:
                present = pair.whole(self._shared[pair.key_A], self._shared[pair.key_B])
                dtypes = self.plan.facts.base_dtypes.get(pair.module, ())
                limits[pair.module] = product_limit(dtypes, largest_product(pair.scaling, *present))
        return limits

    def finish(self) -> tuple[AdapterState, dict[str, LowRank]]:
        """
        The next global state, and what is to be added to the base model. Of several processes the first computes them.

        Raises:
            TooFewClientsError: If fewer updates can be used than `min_clients`, or than the rule needs.
            BrokenStateError: If the result is not finite, or cannot be sent.
        """
        self.rule.bear(len(self._faulty))
        # of those that a robust rule bears, the clients that were refused are some
        require_clients(self.taken, self.refused, max(self.plan.min_clients, self.rule.min_updates))
        state, left, right = from_first(self._combine)
        self.objective.end_round()
        change = {module: LowRank(left[module], right[module]) for module in left}
        self.base_change_bytes = sum(state_bytes(factors._asdict()) for factors in change.values())
        if self.base_sum is not None:
            self.base_sum.end_round(self._round, change)
        return state, change

    def settle(self) -> dict[str, int | None]:
        """
        The new state holds: from now on the updates of the round have counted, as the clients are told in their next
        packets.

        Returns:
            `dict[str, int]`: By client of the round the last round in which its update counted.
        """
        sampled = {*self.taken, *self.refused} if self._sampled is None else self._sampled
        answered = {*self.taken, *self._answered} & sampled
        self.visits.end_round(self._round, sorted(answered), self.taken, self.base_change_bytes)
        return {client: self.visits.counted.get(client) for client in sorted(sampled)}

    def _combine(self) -> tuple[AdapterState, AdapterState, AdapterState]:
        """
        What the rule and the server optimiser make of the round: the state, and the factors of the base's
        change by module.
        """
        delta = self.rule.finish()
        counts = {key: value for key, value in delta.items() if key in self.plan.buffers}
        steps = {key: value for key, value in delta.items() if key not in self.plan.buffers}
        state = self.optimizer.step(self.state, steps, len(self.taken))
        state = PLAIN.step(state, counts)  # running statistics are averages, not parameters
        added = {
            f"the change of {module} ({side})": factor
            for module, change in self.rule.base_change.items()
            for side, factor in change._asdict().items()
        }
        broken = first_not_finite(state | added)
        if broken is not None:
            raise BrokenStateError(
                f"The step of the server has values that are not finite in {broken}, although no update had. "
                f"{WAY_BACK}"
            )
        self._refuse_unsendable(state)
        left, right = ({module: change[side] for module, change in self.rule.base_change.items()} for side in (0, 1))
        return state, left, right

    def _refuse_unsendable(self, state: AdapterState) -> None:
        """Once it is saved, no round could begin with it."""
        drawn = self.plan.drawn_keys
        try:
            self.plan.down.encode({key: state[key] for key in self._shared if key not in drawn})
        except ClientError as error:
            raise BrokenStateError(f"The new global state cannot be sent: {error} {WAY_BACK}") from error

    # What the next round depends on beside the global state

    @property
    def _parts(self) -> dict[str, Aggregator | ServerOptimizer | ServerHalf]:
        return {"rule": self.rule, "optimizer": self.optimizer, "objective": self.objective}

    def state_dict(self) -> AdapterState:
        """What the rule, the server optimiser and the server's part of the local objective remember, by flat names."""
        return {
            f"{name}.{key}": tensor for name, part in self._parts.items() for key, tensor in part.state_dict().items()
        }

    def forget(self) -> None:
        """Begin anew, because other tensors travel from now on."""
        self.load_state_dict({})

    def restart(self) -> None:
        """Begin anew, as before the first round."""
        self.forget()
        self.visits = Visits()

    def load_state_dict(self, state: AdapterState) -> None:
        """Take over a `state_dict`."""
        states: dict[str, AdapterState] = {name: {} for name in self._parts}
        for entry, tensor in state.items():
            name, _, key = entry.partition(".")
            states[name][key] = tensor
        for name, part in self._parts.items():
            part.load_state_dict(states[name])
