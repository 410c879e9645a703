# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""A client's turn: it gets a packet, trains, sends one back, and keeps what is its own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers.utils import logging

from ..config import FederationArguments
from ..federation.base_sum import as_changes
from ..federation.client_settings import ClientSettings
from ..federation.packet import BASE, DELTA, DRAWN, EXTRAS, OBJECTIVE, STATE, Packet, named
from ..federation.plan import Plan
from ..federation.sampling import client_seed
from ..federation.validation import first_not_finite
from ..methods.objectives import LocalObjective
from ..output.timing import timed
from ..state.adapter_state import AdapterState, subtract
from ..state.client_errors import ClientError, TurnFailedError
from .agreement import UNPREPARED
from .data import ClientData
from .live.base_changes import BaseChanges
from .optimizer_state import UnkeptOptimizerError
from .put_back import PutBack, remember_problem_type, remember_random_state, restoring
from .store import ClientStore
from .tasks import Task, Trained


__all__ = ["Client"]

logger = logging.get_logger(__name__)

# what a client keeps: parts of its file
LOCAL, PERSONAL, OBJECTIVE_STATE = "local", "personal", "objective"
OPTIMIZER, PERSONAL_OPTIMIZER = "optimizer", "personal_optimizer"


@dataclass(frozen=True)
class Turn:
    """
    What a turn begins with.

    Args:
        client (`str`), round (`int`), lr_factor (`float`):
            Whose turn it is, in which round, with what factor on the learning rate.
        settings ([`ClientSettings`]):
            What the client does differently.
        state (`dict[str, torch.Tensor]`):
            The global state as the client was sent it, in the shapes of the live model.
        start (`dict[str, torch.Tensor]`):
            The same with what the client keeps of it: what it trains from.
        shared (`dict[str, torch.Tensor]`):
            The part of it that is shared in this round.
        asked (`dict[str, torch.Tensor]`):
            What an update is to be sent of, in the shapes to send.
        received (`dict[str, torch.Tensor]`):
            What the server sends along for the local objective.
        kept (`dict[str, dict[str, torch.Tensor]]`):
            What the client has kept, by part.
    """

    client: str
    round: int
    lr_factor: float
    settings: ClientSettings
    state: AdapterState
    start: AdapterState
    shared: AdapterState
    asked: AdapterState
    received: AdapterState
    kept: dict[str, AdapterState]


@dataclass(frozen=True)
class Outcome:
    """What a turn has come to: nothing is changed yet. The update is as it is sent."""

    sent: AdapterState
    moved: bool
    keeps: dict[str, AdapterState]
    extras: AdapterState
    figures: dict[str, Any]


class Client:
    """
    The clients of this process, one after the other on its one live model. Nothing of the server is known here but
    what is in a packet, and nothing that a client keeps is known there.

    Args:
        trainer ([`EngineMixin`]):
            The engine of the local rounds.
        plan ([`Plan`]):
            What the settings imply.
        data ([`ClientData`]):
            The data of the clients.
        store ([`ClientStore`]):
            What they keep.
        state (`dict[str, torch.Tensor]`):
            What is trained, before the first round: agreed on with the server.
        base_changes ([`BaseChanges`], *optional*):
            What rules add to the base weights of a client elsewhere; in the server's process they are the server's.
        is_elsewhere (`bool`, *optional*, defaults to `False`):
            Whether the server is another process, which may go back to its last checkpoint while this one goes on.
    """

    def __init__(
        self,
        trainer: Any,
        plan: Plan,
        data: ClientData,
        store: ClientStore,
        state: AdapterState,
        base_changes: BaseChanges | None = None,
        is_elsewhere: bool = False,
    ) -> None:
        self.trainer, self.plan, self.data, self.store = trainer, plan, data, store
        self.base_changes, self.is_elsewhere = base_changes, is_elsewhere
        self.args: FederationArguments = trainer.args
        self._known = dict(state)
        # by client elsewhere what it was sent in the shapes of its rank, and is not sent twice
        self._of_smaller_rank: dict[str, AdapterState] = {}

    def begin(self, state: AdapterState, done: int = 0) -> None:
        """
        What is trained is known to be `state`: at the start, as other tensors are trained from now on, or when a
        run goes on after round `done`. Then it is known as it was sent.
        """
        sent = set().union(*(self.plan.shared_keys(state, round) for round in range(1, min(done, 2) + 1)))
        shared = {key: state[key] for key in sent}
        self._known = {**state, **self.plan.down.decode(self.plan.down.encode(shared), shared)}

    def turn(self, packet: Packet) -> Packet:
        """
        One client's turn.

        Args:
            packet ([`Packet`]):
                What the server sends; its `kind` is `"train"`.

        Returns:
            [`Packet`]: the update.

        Raises:
            TurnFailedError: If it comes to nothing.
            UnkeptOptimizerError: If the optimiser cannot be kept by client, which is no client's fault.
        """
        seconds: dict[str, float] = {}
        with timed(seconds, "prepare"):
            turn = self._begin_turn(packet)
        outcome = self._try(turn, seconds)
        self._keep(turn, outcome, packet)
        return self._answer(turn, outcome, seconds)

    def model_state(self, state: AdapterState, client: str, counted: int | None) -> AdapterState:
        """
        What the model of a client is made of: the global `state` with the tensors that the client keeps, or its own
        model (Ditto). One that has not trained yet has the global state.
        """
        kept = self.store.read(client, counted)
        return {**state, **kept.get(LOCAL, {}), **kept.get(PERSONAL, {})}

    def evaluate(self, packet: Packet) -> Packet:
        """
        The client's evaluation of the state in a packet, on its own held-out data.

        Args:
            packet ([`Packet`]):
                What the server sends; its `kind` is `"evaluate"`.

        Returns:
            [`Packet`]: the figures.
        """
        client = packet.meta["client"]
        self.trainer._before_new_state(self._known)  # of a client of the round, and of one that has waited
        self._take(packet)
        kept = self._kept(packet)
        state = {**self._known, **kept.get(LOCAL, {}), **kept.get(PERSONAL, {})}
        figures, num_examples = self.trainer.evaluate_state(client, state)
        about = {"round": packet.meta["round"], "client": client, "num_examples": num_examples, "metrics": figures}
        return Packet("metrics", {}, about)

    # The steps of a turn

    def _begin_turn(self, packet: Packet) -> Turn:
        meta, plan = packet.meta, self.plan
        client, round = meta["client"], meta["round"]
        settings, keys, state = self._take(packet)  # first: a turn that fails counts as one that has what it was sent
        kept = self._kept(packet)
        shared = {key: tensor for key, tensor in state.items() if key in keys}
        return Turn(
            client,
            round,
            meta["lr_factor"],
            settings,
            state=state,
            start={**state, **kept.get(LOCAL, {})},
            shared=shared,
            asked=plan.asked_of(plan.cut_to_rank(shared, settings), settings),
            received=packet.part(OBJECTIVE),
            kept=kept,
        )

    def _take(self, packet: Packet) -> tuple[ClientSettings, set[str], AdapterState]:
        """
        Take over what the server sends: the settings of the client, the names of what is shared in the round, and the
        global state as the client was sent it.
        """
        meta, plan = packet.meta, self.plan
        settings = plan.settings_of(meta["client"], meta["rank"])
        keys = plan.shared_keys(self._known, meta["round"])
        like = {**self._known, **plan.cut_to_rank({key: self._known[key] for key in keys}, settings)}
        sent = {**plan.down.decode(packet.part(STATE), like), **packet.part(DRAWN)}
        if factors := packet.part(BASE):
            assert self.base_changes is not None  # by the same plan
            if meta["base_is"] == "sum":
                self.base_changes.load_state_dict(factors)
            else:
                self.base_changes.add(as_changes(factors))
        own = self._of_smaller_rank.setdefault(meta["client"], {}) if self.is_elsewhere else {}
        for key, tensor in sent.items():
            if tensor.shape == self._known[key].shape:
                self._known[key] = tensor
                own.pop(key, None)
            else:
                own[key] = tensor
        whole = {key: _padded(tensor, self._known[key].shape) for key, tensor in own.items()}
        return settings, keys, {**self._known, **whole}

    def _kept(self, packet: Packet) -> dict[str, AdapterState]:
        """What the client has kept, by part."""
        client, counted = packet.meta["client"], packet.meta["counted"]
        kept = self.store.read(client, counted)
        is_kept = self.is_elsewhere and counted is not None and self.plan.clients_keep(self._known)
        if is_kept and self.store.round_of(client, counted) != counted:
            raise ClientError(
                f"client {client!r} has kept nothing of round {counted}, in which its update counted, so it cannot go "
                "on from there. Start it with the folder that it has worked in, or begin a new run"
            )
        return kept

    def _try(self, turn: Turn, seconds: dict[str, float]) -> Outcome:
        """The local round, as often as `client_retries` allows."""
        trainer, attempts = self.trainer, 1 + self.args.client_retries
        reason = ""
        for attempt in range(1, attempts + 1):
            try:
                with restoring(*self._remember_turn(), only_after_failure=True):
                    with timed(seconds, "prepare"), trainer._failing_together(UNPREPARED):
                        dataset = self.data.prepared(turn.client)
                        if self.plan.counts_tokens:
                            self.data.count(turn.client)
                    with timed(seconds, "local"):
                        return self._train(turn, dataset)
            except UnkeptOptimizerError:
                raise  # no client's fault
            except Exception as error:
                reason = f"its local round failed: {trainer._reason_of_all(error, turn.client, turn.round)}"
                logger.warning(
                    f"Round {turn.round}, client {turn.client!r}, attempt {attempt} of {attempts}: {reason}",
                    exc_info=True,
                )
            with timed(seconds, "local"):
                trainer._recover()  # here the error no longer holds on to activations
        raise TurnFailedError(reason, seconds)

    def _remember_turn(self) -> list[PutBack]:
        """What a turn that breaks off must not have moved on, beside what its local rounds put back."""
        trainer = self.trainer
        return [remember_random_state(), remember_problem_type(trainer.model), trainer._remember_figures()]

    def _train(self, turn: Turn, dataset: Dataset) -> Outcome:
        objective, kept = self.plan.objective, turn.kept
        is_personal = objective is not None and objective.is_personal
        if objective is not None:
            objective.begin(turn.shared, self._memory(objective, turn), turn.received)
        of_rule = None if is_personal else objective
        trained = self._local_round(turn, dataset, turn.start, of_rule, kept.get(OPTIMIZER))
        local, figures = trained.state, trained.metrics
        delta, extras = subtract(local, turn.start), {}
        keeps: dict[str, AdapterState] = {LOCAL: {key: local[key] for key in self.plan.local_keys(local)}}
        if trained.optimizer_state is not None:
            keeps[OPTIMIZER] = {**kept.get(OPTIMIZER, {}), **trained.optimizer_state}
        if objective is not None:
            keeps[OBJECTIVE_STATE] = objective.finish({key: delta[key] for key in turn.shared})
            extras = objective.to_server()
        if is_personal:
            own = {**turn.start, **kept.get(PERSONAL, {})}
            personal = self._local_round(turn, dataset, own, objective, kept.get(PERSONAL_OPTIMIZER))
            keeps[PERSONAL] = personal.state
            if personal.optimizer_state is not None:
                keeps[PERSONAL_OPTIMIZER] = {**kept.get(PERSONAL_OPTIMIZER, {}), **personal.optimizer_state}
            figures |= {f"personal_{key}": value for key, value in personal.metrics.items()}
        self._check_finite(keeps)
        buffers = self.plan.buffers  # which a forward pass changes
        moved = any(bool(tensor.any()) for key, tensor in delta.items() if key not in buffers)
        return Outcome(self._encoded(turn, delta), moved, keeps, extras, figures)

    def _encoded(self, turn: Turn, delta: AdapterState) -> AdapterState:
        """What is asked for of a delta of full shape, as it is sent."""
        asked = {
            key: delta[key][tuple(slice(size) for size in tensor.shape)].contiguous()
            for key, tensor in turn.asked.items()
        }
        return self.plan.up.encode(asked, client_seed(self.args.seed, turn.round, f"rounding of {turn.client}"))

    def _local_round(
        self,
        turn: Turn,
        dataset: Dataset,
        start: AdapterState,
        objective: LocalObjective | None,
        optimizer_state: AdapterState | None,
    ) -> Trained:
        args, seed = self.args, (turn.round, turn.client)
        task = Task(
            start,
            dataset=dataset,
            seed=client_seed(args.seed, *seed),
            data_seed=None if args.data_seed is None else client_seed(args.data_seed, *seed),
            lr_factor=turn.lr_factor,
            trained=self.plan.trained_keys(start, turn.round, turn.settings),
            max_steps=turn.settings.max_steps,
            objective=objective,
            timeout=args.client_timeout,
            optimizer_state=optimizer_state,
            keeps_optimizer=args.keep_optimizer_state,
            global_state=turn.state,
        )
        (trained,) = self.trainer.local_rounds([task])
        return trained

    def _memory(self, objective: LocalObjective, turn: Turn) -> AdapterState | None:
        """What the local objective is told of the client."""
        if turn.kept.get(OBJECTIVE_STATE):
            return turn.kept[OBJECTIVE_STATE]
        return objective.first_memory(turn.settings.r, turn.shared)

    def _check_finite(self, keeps: Mapping[str, AdapterState]) -> None:
        """What a client keeps is its own to check: once not finite, it would be so in all rounds to come."""
        kept = {f"{key} ({part})": tensor for part, state in keeps.items() for key, tensor in state.items()}
        if (broken := first_not_finite(kept)) is not None:
            self.trainer._all_have_stopped = True  # the processes keep the same
            raise ClientError(
                f"{broken}, which stays with the client, has values that are not finite. Lower `learning_rate`."
            )

    def _keep(self, turn: Turn, outcome: Outcome, packet: Packet) -> None:
        """What the client keeps holds as soon as it is told that the update has counted."""
        if self.trainer.is_world_process_zero():
            saved = packet.meta.get("saved") if self.is_elsewhere else None
            self.store.write(turn.client, outcome.keeps, turn.round, packet.meta["counted"], saved)
            if self.is_elsewhere:
                self.store.settle({})  # no verdict is known yet, but another process may go on from here

    def _answer(self, turn: Turn, outcome: Outcome, seconds: dict[str, float]) -> Packet:
        return Packet(
            "update",
            {**named(DELTA, outcome.sent), **named(EXTRAS, outcome.extras)},
            {
                "round": turn.round,
                "client": turn.client,
                "num_examples": self.data.num_examples(turn.client),
                "num_steps": int(outcome.figures["num_steps"]),
                "num_tokens": self.data.num_tokens.get(turn.client),
                "base_digest": self.plan.facts.base_digest,
                "numbers": list(self.plan.rule.numbers),
                "figures": outcome.figures,
                "moved": outcome.moved,
                "has_rate": self.trainer._has_rate,
                "seconds": seconds,
            },
        )


def _padded(tensor: torch.Tensor, shape: Collection[int]) -> torch.Tensor:
    """A tensor of a smaller rank in the shape of the live model, with zeros behind."""
    missing = [whole - part for whole, part in zip(shape, tensor.shape, strict=True)]
    if not any(missing):
        return tensor
    return nn.functional.pad(tensor, [size for pair in ((0, m) for m in reversed(missing)) for size in pair])
