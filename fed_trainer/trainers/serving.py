# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""A trainer as the coordinator of a federation between machines."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from ..client.invitations import describe_run
from ..federation.packet import Packet, named
from ..federation.rounds import refuse_trained_base
from ..federation.sampling import ClientSampler
from ..federation.transport.ends import Network
from ..federation.transport.exchange import Exchange, check_names, names_of
from ..federation.transport.roster import Roster
from ..federation.watch import Watch
from ..methods.aggregation import METHODS
from ..output.checkpoint import refuse_another_run
from ..output.record import read_header
from ..state.checks import check_integer, check_number
from .elsewhere import ClientsElsewhere


__all__ = ["ADAPTER", "REFERENCE", "Serving"]

logger = logging.get_logger(__name__)

# parts of an invitation
ADAPTER, REFERENCE = "adapter", "reference"


class Serving:
    """
    The run of a federation whose clients are in other processes.

    Args:
        trainer ([`FederatedMixin`]):
            The trainer.
        network ([`Network`]):
            Where the clients are met.
        clients (`int` or `Sequence[str]`):
            Their names, or how many there are.
        wait (`float`):
            Seconds to wait for them before the first round.
        round_timeout (`float`):
            Seconds after which a client that has not answered is given up.
        watch (`Callable`, *optional*):
            Called with the content of the [`Watch`] when something has changed.
    """

    def __init__(
        self,
        trainer: Any,
        network: Network,
        clients: int | Sequence[str],
        wait: float,
        round_timeout: float,
        watch: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        for name, value in (("wait", wait), ("round_timeout", round_timeout)):
            check_number(name, value, lambda seconds: seconds > 0, "a positive number of seconds")
        if isinstance(clients, str):
            raise ValueError(f"`clients` should be a list of names, or a number, but the value passed is {clients!r}.")
        if isinstance(clients, int):
            check_integer("clients", clients, least=1)
        else:
            clients = check_names(clients)
        self._trainer, self._network, self._clients = trainer, network, clients
        self._wait, self._round_timeout, self._watch = wait, round_timeout, watch
        self._roster: Roster | None = None
        self._exchange: Exchange | None = None

    def run(self, resume_from_checkpoint: str | bool | None) -> TrainOutput:
        """All rounds that remain, as `FederatedMixin.train`."""
        trainer = self._trainer
        if not resume_from_checkpoint:  # before anybody is told of it
            refuse_another_run(trainer._files.folder)
        trainer._run_id = self._run_id(resume_from_checkpoint)
        self._end = self._network.server_end()
        self._end.open(trainer._run_id)
        reason, is_finished, is_void = "its coordinator has stopped", False, not resume_from_checkpoint
        try:
            self._end.greet(json.dumps({"run": trainer._run_id}).encode())
            self._found(self._names(resume_from_checkpoint))
            trainer._serving = self
            output = trainer._run.run(resume_from_checkpoint, None)
            done = trainer.federation.done
            is_finished, is_void = done >= trainer.args.num_rounds, False
            reason = f"{done} of {trainer.args.num_rounds} rounds are done"
        except BaseException as error:
            reason = f"its coordinator has stopped ({type(error).__name__})"
            is_void = is_void and (self._exchange is None or not trainer.federation.done)
            raise
        finally:
            trainer._serving = None
            self._end.close(reason, is_finished, is_void and not is_finished)
        return output

    def _run_id(self, resume_from_checkpoint: str | bool | None) -> str:
        """The id of the run that is resumed, or a new one."""
        if resume_from_checkpoint:
            folder = self._trainer._files.folder if resume_from_checkpoint is True else Path(resume_from_checkpoint)
            known = read_header(folder).get("run")
            if isinstance(known, str):
                return known
        return f"{self._trainer._files.folder.name or 'run'}-{secrets.token_hex(4)}"

    def _names(self, resume_from_checkpoint: str | bool | None) -> list[str]:
        if not isinstance(self._clients, int):
            return self._clients
        known = read_header(self._trainer._files.folder).get("clients") if resume_from_checkpoint else None
        if isinstance(known, dict) and len(known) == self._clients:
            return sorted(known)
        logger.info(f"Waiting for {self._clients} clients.")
        return names_of(self._end, self._clients, self._wait)

    def _found(self, names: list[str]) -> None:
        trainer = self._trainer
        start = trainer._start_state if trainer._unfounded_start is None else trainer._unfounded_start
        refuse_trained_base(METHODS[trainer.args.aggregation], trainer.args.aggregation, type(self._network).__name__)
        trainer.sampler = ClientSampler(names, trainer.args.clients_per_round, trainer.args.seed)
        plan = trainer._plan(start, names, len(names), trainer.sampler.num_sampled)
        self._roster = Roster(self._end, names, self._invitation)
        self.watch = Watch(names, trainer.args.num_rounds, self._show)
        self._exchange = Exchange(self._end, self._roster, self._round_timeout, self.watch.saw, self.watch.moved)
        trainer._found(ClientsElsewhere(plan), start)
        trainer._found_server(start, self._exchange)
        trainer._unfounded_start = None

    def _show(self, content: dict[str, Any]) -> None:
        self._end.show(content)
        if self._watch is not None:
            self._watch(content)

    def gather(self) -> None:
        """Wait for the clients, before the first round."""
        assert self._exchange is not None
        self._end.begin()  # the record is written, with the id of the run
        self._exchange.gather(self._wait, self._trainer.args.min_clients)
        self._trainer.record["clients"] |= self.sizes()
        self._trainer._run_record.begin_files()

    def sizes(self) -> dict[str, dict[str, Any]]:
        """As [`client_sizes`], of what the clients say; `None` for what is not known."""
        return {client: self._size(client) for client in self._trainer.sampler.clients}

    def _size(self, client: str) -> dict[str, Any]:
        about = {} if self._roster is None else self._roster.about(client)
        count, composition = about.get("num_examples"), about.get("label_counts")
        is_count = type(count) is int and 0 <= count <= 2**53
        is_composition = isinstance(composition, dict) and all(type(each) is int for each in composition.values())
        return {
            "num_examples": count if is_count else None,
            "composition": composition if is_composition else None,
            "is_elsewhere": True,
        }

    def _invitation(self) -> Packet:
        """The packet that a process is invited with: all that it has to know, and the adapter."""
        trainer = self._trainer
        adapter = trainer._checkpoints.live_state()
        tensors = {**named(ADAPTER, adapter), **named(REFERENCE, trainer._reference_state())}
        return Packet("invite", tensors, describe_run(trainer))
