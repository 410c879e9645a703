# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What happens at one client in one round: it gets, trains, sends and keeps."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from transformers.utils import logging

from ..config import FederationArguments, joins_examples, local_batch
from ..data.client_datasets import recent
from ..federation.client_settings import ClientSettings
from ..federation.movement import Movement
from ..federation.sampling import ClientSampler, client_seed
from ..federation.server import Server
from ..federation.traffic import download_bytes, upload_bytes
from ..federation.validation import TooFewClientsError, first_not_finite
from ..methods.aggregation import ClientUpdate
from ..output.timing import timed
from ..state.adapter_state import AdapterState, subtract
from ..state.client_errors import ClientError, public_reason
from .agreement import UNPREPARED
from .between_rounds import BetweenRoundsMixin
from .evaluation import ClientEvaluationMixin
from .optimizer_state import UnkeptOptimizerError
from .put_back import PutBack, remember_problem_type, remember_random_state, restoring
from .store import ClientStore
from .token_counts import count_tokens


__all__ = ["ClientTurnMixin"]

logger = logging.get_logger(__name__)

KEPT_PREPARED = 256  # datasets
# what a client keeps: parts of its file
LOCAL, PERSONAL, OBJECTIVE = "local", "personal", "objective"
OPTIMIZER, PERSONAL_OPTIMIZER = "optimizer", "personal_optimizer"


class ClientTurnMixin(BetweenRoundsMixin, ClientEvaluationMixin):
    """The turn of a client within a round, on the live model."""

    args: FederationArguments
    server: Server
    sampler: ClientSampler
    _store: ClientStore
    _clients: Mapping[str, Dataset]
    _client_settings: dict[str, ClientSettings]
    _prepared_clients: dict[str, Dataset]
    _num_tokens: dict[str, int]  # of clients that have been counted, if the mean is weighted by them
    _local_keys: set[str]
    _base_digest: str | None
    _record: dict[str, Any]
    _movement: Movement
    _bytes_in_vain: Counter[str]  # traffic of the round's clients that were left out

    def _client_round(
        self, client: str, round: int, lr_factor: float, seconds: dict[str, float]
    ) -> dict[str, Any] | None:
        """
        One client's turn: it gets the shared tensors, trains, and its update is offered to the server.

        Returns:
            `dict[str, Any]` or `None`: its figures, if its update counts; `server.refused` says why it does not.
        """
        with timed(seconds, "prepare"):
            kept = self._store.read(client)
            settings = self._settings_of(client, kept)
            asked, shared = self.server.asked_of(settings), self.server.start_of(settings)
            start = {**self._global_state, **shared, **kept.get(LOCAL, {})}
        trained = None
        for attempt in range(1 + self.args.client_retries):
            try:
                with restoring(*self._remember_turn(), only_after_failure=True):
                    with timed(seconds, "prepare"), self._failing_together(UNPREPARED):
                        dataset = self._prepared_client(client)
                        if self.server.counts_tokens and client not in self._num_tokens:
                            self._num_tokens[client] = self._count_tokens(client, dataset)
                    with timed(seconds, "local"):
                        trained = self._train_client(client, round, lr_factor, dataset, settings, start, shared, kept)
                break
            except UnkeptOptimizerError:
                raise  # no client's fault
            except Exception as error:
                reason = f"its local round failed: {self._reason_of_all(error, client, round)}"
                logger.warning(
                    f"Round {round}, client {client!r}, attempt {attempt + 1} of {1 + self.args.client_retries}: {reason}",
                    exc_info=True,
                )
            with timed(seconds, "local"):
                self._recover()  # here the error no longer holds on to activations
        traffic = {"bytes_down": download_bytes(self.server, client, settings, self._record["rounds"])}
        if trained is None:
            self._bytes_in_vain.update(traffic)
            self.server.leave_out(client, reason)
            return None
        delta, keeps, extras, metrics = trained
        with timed(seconds, "aggregate"):
            update = ClientUpdate(
                client,
                self._num_examples(client),
                self.server.cut(delta, asked),
                metrics,
                num_steps=int(metrics["num_steps"]),
                base_digest=self._base_digest,
                num_tokens=self._num_tokens.get(client),
                extras=extras,
            )
            traffic["bytes_up"] = upload_bytes(self.server, update)
            if self.server.receive(update, asked) is not None:
                self._bytes_in_vain.update(traffic)
                return None
            self._has_counted(client, delta, keeps, round)
        return {"num_examples": update.num_examples, **metrics, **traffic}

    def _has_counted(self, client: str, delta: AdapterState, keeps: dict[str, AdapterState], round: int) -> None:
        """The client's update counts, so what it has changed does too, and what it keeps is kept."""
        buffers = self._live_adapter.buffers  # which a forward pass changes
        self._movement.saw(client, {key: delta[key] for key in delta.keys() - buffers}, self._has_rate)
        if self.is_world_process_zero():
            self._store.write(client, keeps, round)

    def _remember_turn(self) -> list[PutBack]:
        """What a turn that breaks off must not have moved on, beside what its local rounds put back."""
        return [remember_random_state(), remember_problem_type(self.model), self._remember_figures()]

    def _train_client(
        self,
        client: str,
        round: int,
        lr_factor: float,
        dataset: Dataset,
        settings: ClientSettings,
        start: AdapterState,
        shared: AdapterState,
        kept: dict[str, AdapterState],
    ) -> tuple[AdapterState, dict[str, AdapterState], AdapterState, dict[str, Any]]:
        """
        The client's update in the shape of the live model, what it is to keep, what it sends beside the update, and
        its figures; nothing is changed yet.
        """
        train = functools.partial(
            self.local_round,
            dataset=dataset,
            seed=client_seed(self.args.seed, round, client),
            data_seed=None if self.args.data_seed is None else client_seed(self.args.data_seed, round, client),
            lr_factor=lr_factor,
            trained=self.server.trained_keys(self._global_state, round, settings),
            max_steps=settings.max_steps,
            timeout=self.args.client_timeout,
        )
        objective = self.server.objective
        is_personal = objective is not None and objective.is_personal
        if objective is not None:
            objective.begin(shared, self._remembered(kept, settings))
        local, metrics = train(
            start, objective=None if is_personal else objective, optimizer_state=kept.get(OPTIMIZER)
        )
        delta, extras = subtract(local, start), {}
        keeps: dict[str, AdapterState] = {LOCAL: {key: local[key] for key in self._local_keys & local.keys()}}
        if self.args.keep_optimizer_state:
            keeps[OPTIMIZER] = {**kept.get(OPTIMIZER, {}), **self.optimizer_state()}
        if objective is not None:
            keeps[OBJECTIVE] = objective.finish({key: delta[key] for key in shared})
            extras = objective.to_server()
        if is_personal:
            keeps[PERSONAL], personal = train(
                {**start, **kept.get(PERSONAL, {})},
                objective=objective,
                optimizer_state=kept.get(PERSONAL_OPTIMIZER),
            )
            if self.args.keep_optimizer_state:
                keeps[PERSONAL_OPTIMIZER] = {**kept.get(PERSONAL_OPTIMIZER, {}), **self.optimizer_state()}
            metrics |= {f"personal_{key}": value for key, value in personal.items()}
        self._check_finite(keeps)
        return delta, keeps, extras, metrics

    def _check_finite(self, keeps: Mapping[str, AdapterState]) -> None:
        """What a client keeps is its own to check: once not finite, it would be so in all rounds to come."""
        kept = {f"{key} ({part})": tensor for part, state in keeps.items() for key, tensor in state.items()}
        if (broken := first_not_finite(kept)) is not None:
            self._all_have_stopped = True  # the processes keep the same
            raise ClientError(
                f"{broken}, which stays with the client, has values that are not finite. Lower `learning_rate`."
            )

    def _remembered(self, kept: dict[str, AdapterState], settings: ClientSettings) -> AdapterState | None:
        """What the local objective is told of the client."""
        return kept.get(OBJECTIVE) or self.server.first_memory(settings)

    def _settings_of(self, client: str, kept: dict[str, AdapterState]) -> ClientSettings:
        settings = self._client_settings.get(client, ClientSettings())
        rank = kept.get(OBJECTIVE, {}).get("rank")  # of HetLoRA's self-pruning
        return settings if rank is None else dataclasses.replace(settings, r=int(rank))

    @property
    def has_personal_models(self) -> bool:
        """Whether clients keep a part of their model, so that there is none for all."""
        objective = self.server.objective
        return bool(self._local_keys) or (objective is not None and objective.is_personal)

    def client_state(self, client: str) -> AdapterState:
        """
        What the model of a client is made of: the global state with the tensors that the client keeps, or its own model (Ditto).
        A client that has not trained yet has the global state.
        """
        kept = self._store.read(client)
        return {**self._global_state, **kept.get(LOCAL, {}), **kept.get(PERSONAL, {})}

    def _num_examples(self, client: str) -> int:
        """Examples that are trained on; preparation drops those without a label, and packing joins them."""
        if joins_examples(self.args):
            return self._record["clients"][client]["num_examples"]
        return len(self._prepared_client(client))

    def _count_tokens(self, client: str, dataset: Dataset) -> int:
        rows: Any = self._remove_unused_columns(dataset, description="training")
        seed = client_seed(self.args.seed, 0, client)
        size = self.args.per_device_train_batch_size
        return count_tokens(rows, self.data_collator, size, self._loss_shifts_labels, seed)

    def _prepared_client(self, client: str) -> Dataset:
        """A client's dataset, tokenised at its first local round and kept, until many others have come after it."""
        return recent(self._prepared_clients, client, lambda: self._prepare_client(client), self._num_kept)

    def _first_prepared(self) -> Dataset:
        """
        The data of the first client that can be prepared. The others before it are tried again in their turns.

        Raises:
            TooFewClientsError: If there is none, which is known before the first round then.
        """
        reasons: dict[str, str] = {}
        cause = None
        for client in self._clients:
            try:
                with self._failing_together(UNPREPARED):
                    return self._prepared_client(client)
            except Exception as error:
                cause = cause or error
                reasons[client] = public_reason(error)
                logger.warning(
                    f"Client {client!r} cannot be prepared and is tried again in its turn: {reasons[client]}"
                )
            self._all_have_stopped = False
        shown = "; ".join(f"{client!r}: {reason}" for client, reason in list(reasons.items())[:3])
        raise TooFewClientsError(
            f"None of the {len(reasons)} clients can be prepared, so there is nothing to train on. The first: {shown}"
        ) from cause

    def _prepare_client(self, client: str) -> Dataset:
        raw = self._clients[client]
        prepared = self._prepare_client_dataset(raw, client)
        self._check_prepared(client, len(raw), len(prepared))
        return prepared

    @property
    def _num_kept(self) -> int:
        """How many prepared datasets stay in memory: all of a round."""
        return max(KEPT_PREPARED, self.sampler.num_sampled)

    def _check_prepared(self, client: str, num_raw: int, num_prepared: int) -> None:
        if num_prepared == 0:
            raise ClientError(
                f"Client {client!r} has {num_raw} examples, but none is left after preparation: no label of them is within "
                "`max_length`. Raise it (prompts may fill it), or leave the client out."
            )
        if num_prepared < local_batch(self.args) and not joins_examples(self.args):
            raise ClientError(
                f"Client {client!r} has {num_raw} examples, but only {num_prepared} are left after preparation (the others have no "
                f"label within `max_length`), fewer than one local batch of {local_batch(self.args)}. Raise `max_length` (prompts "
                "may fill it), lower the batch size, or leave the client out."
            )

    def _prepare_client_dataset(self, dataset: Dataset, client: str) -> Dataset:
        """Tokenise one client's data; the base trainer's own preparation, where it has one."""
        return dataset

    def _prepare_held_out_dataset(self, dataset: Dataset, client: str) -> Dataset:
        return self._prepare_client_dataset(dataset, client)
