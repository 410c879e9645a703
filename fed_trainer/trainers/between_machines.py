# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""A trainer as one side of a federation between machines."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from datasets import Dataset
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import TrainOutput

from ..client.data import ClientData
from ..client.engines import Engine
from ..client.gate import gate_at
from ..client.policy import Policy
from ..config import FederationArguments
from ..federation.transport.ends import Network
from ..output.record import client_sizes
from ..output.run_lock import owning
from .files import RunFiles
from .refusals.callbacks import refuse_callbacks
from .serving import Serving
from .taking_part import TakingPart
from .unnamed import UNNAMED


__all__ = ["BetweenMachinesMixin"]


class BetweenMachinesMixin:
    """Adds `serve` and `join` to a [`~fed_trainer.trainers.mixin.FederatedMixin`]."""

    args: FederationArguments
    callback_handler: CallbackHandler
    eval_dataset: Any
    _clients: Mapping[str, Dataset]
    _data: ClientData
    _engine: Engine
    _files: RunFiles
    _serving: Serving | None = None  # within `serve`
    _run_id: str | None = None  # of a run between machines
    _told: Mapping[str, Any] = MappingProxyType({})  # what a coordinator says of its run beside settings and adapter

    def _refuse_within_client_model(self, use: str) -> None:
        raise NotImplementedError

    def _check_model(self) -> None:
        raise NotImplementedError

    def serve(
        self,
        transport: Network,
        clients: int | Sequence[str],
        wait: float = 3600.0,
        round_timeout: float = 3600.0,
        resume_from_checkpoint: str | bool | None = None,
        watch: Callable[[dict[str, Any]], None] | None = None,
    ) -> TrainOutput:
        """
        Run the federation with clients in other processes, which [`~FederatedMixin.join`] it. This process needs no
        data of clients and no GPU; it holds the base model, and evaluates on `eval_dataset`, if there is one. If not,
        the clients evaluate on theirs.

        Args:
            transport ([`Network`]):
                Where the clients are met, such as a [`Store`].
            clients (`int` or `Sequence[str]`):
                Their names, or how many there are: then the first that come are the clients of the run.
            wait (`float`, *optional*, defaults to `3600.0`):
                Seconds to wait for the clients before the first round. It begins without those that have not come, if
                there are `min_clients`; they may come later.
            round_timeout (`float`, *optional*, defaults to `3600.0`):
                Seconds after which a round goes on without a client that has not answered.
            resume_from_checkpoint (`str` or `bool`, *optional*):
                As for [`~FederatedMixin.train`].
            watch (`Callable`, *optional*):
                Called with what each client does at present, and what it has sent, whenever that has changed.

        Returns:
            `TrainOutput`: As [`~FederatedMixin.train`].

        Raises:
            NetworkError: If there is another coordinator, or another run, or too few clients have come.
            NotImplementedError: For a method that trains base weights, or several processes.
            ValueError: And all else that [`~FederatedMixin.train`] raises.
        """
        self._refuse_within_client_model("train")
        if self._engine.num_processes > 1:
            raise NotImplementedError(
                f"A coordinator is one process, but {self._engine.num_processes} were launched. Start it without a "
                "launcher; it needs no GPU."
            )
        refuse_callbacks(self.callback_handler.callbacks)
        self._check_model()
        with owning(self._files.folder):
            return Serving(self, transport, clients, wait, round_timeout, watch).run(resume_from_checkpoint)

    def join(
        self,
        transport: Network,
        name: str | Sequence[str] | None = None,
        policy: Policy | str | os.PathLike | None = None,
    ) -> str:
        """
        Take part in a federation that [`~FederatedMixin.serve`] runs elsewhere, until it is over. Model, PEFT config
        and settings have to be those of the coordinator; its adapter replaces the one of this trainer.

        Args:
            transport ([`Network`]):
                Where the coordinator is met, such as a [`Store`].
            name (`str` or `Sequence[str]`, *optional*):
                The name of this client. A trainer with the data of several clients takes part as those that are
                named, or as all of them.
            policy ([`Policy`] or `str`, *optional*):
                What a run may ask, and what may leave; or the YAML file that says so. What leaves is written to
                `sent.jsonl` in `output_dir` in any case.

        Returns:
            `str`: How the run has ended.

        Raises:
            DeclinedError: If this process cannot or will not take part; the coordinator is told why.
            EndedError: If the run was broken off, or its coordinator is gone.
            NetworkError: If the transport cannot be used.
            ValueError: If there is no data of such a client.
        """
        self._refuse_within_client_model("train")
        clients, folder = self._take_names(name), self._files.folder
        rules = policy if policy is None or isinstance(policy, Policy) else Policy.load(policy)
        with owning(folder):
            return TakingPart(self, transport, clients, gate_at(folder, transport, rules)).run()

    def _take_names(self, name: str | Sequence[str] | None) -> list[str]:
        """The clients that this trainer stands for; data without a name gets it."""
        if not self._clients:
            raise ValueError(
                "This trainer has no training data, so it can coordinate (`serve`), but not take part. Give it a "
                "`train_dataset`."
            )
        if UNNAMED not in self._clients:
            names = [name] if isinstance(name, str) else list(self._clients) if name is None else list(name)
            missing = [each for each in names if each not in self._clients]
            if missing:
                raise ValueError(f"There is no client {missing[0]!r}. The clients are {sorted(self._clients)}.")
            return names
        if not isinstance(name, str):
            raise ValueError(f"`name` should be the name of this client, but the value passed is {name!r}.")
        self._clients = {name: self._clients[UNNAMED]}
        self._data.rename(name, self._clients)
        if isinstance(self.eval_dataset, Mapping) and UNNAMED in self.eval_dataset:
            self.eval_dataset = {name: self.eval_dataset[UNNAMED]}
        return [name]

    def _client_sizes(self) -> dict[str, dict[str, Any]]:
        """The clients of the record."""
        if self._serving is not None:
            return self._serving.sizes()
        return client_sizes(self._clients, self.args.label_column)

    def _meet_clients(self) -> None:
        """Before the first round of a run, or the first after a checkpoint."""
        if self._serving is not None:
            self._serving.gather()
