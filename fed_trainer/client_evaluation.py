# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Evaluation of every client's own model on its own held-out data."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from datasets import Dataset
from transformers import Trainer
from transformers.trainer_utils import speed_metrics
from transformers.utils import logging

from .adapter_state import AdapterState, LiveState
from .client_datasets import recent
from .figures import ClientMeans, means_over_clients, without_speed


__all__ = ["ClientEvaluationMixin"]

logger = logging.get_logger(__name__)


class ClientEvaluationMixin(Trainer):
    """
    Where `eval_dataset` is a dictionary by client, each is evaluated with the model of that client: the global one, with the
    tensors that the client keeps.
    """

    _live_adapter: LiveState
    _global_state: AdapterState
    _clients: Mapping[str, Dataset]
    _prepared_held_out: dict[str, Dataset]
    client_evaluation: dict[str, dict[str, Any]] | None = None
    """Figures of the last evaluation by client; `None` if it was not one by client."""
    client_means: ClientMeans | None = None
    """The means of it, with the number of clients that had each figure."""

    def client_state(self, client: str) -> AdapterState:
        """What the model of a client is made of."""
        raise NotImplementedError

    @property
    def _num_kept(self) -> int:
        """How many prepared datasets stay in memory."""
        raise NotImplementedError

    def _prepare_held_out_dataset(self, dataset: Dataset, client: str) -> Dataset:
        """Tokenise one client's held-out data."""
        raise NotImplementedError

    def _prepare_held_out(self, held_out: Mapping[str, Dataset], client: str) -> Dataset:
        prepared = self._prepare_held_out_dataset(held_out[client], client)
        if len(prepared) == 0:
            raise ValueError(
                f"Of the held-out data of client {client!r} nothing is left after preparation: no label of it is within `max_length`. "
                "Raise it, or leave the client out of `eval_dataset`."
            )
        return prepared

    @property
    def has_personal_models(self) -> bool:
        """Whether clients keep a part of their model, so that there is none for all."""
        raise NotImplementedError

    @property
    def evaluates_clients(self) -> bool:
        """Whether every key of `eval_dataset` is a client."""
        held_out = self.eval_dataset
        return isinstance(held_out, Mapping) and len(held_out) > 0 and held_out.keys() <= self._clients.keys()

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """
        As [`~transformers.Trainer.evaluate`]; for an `eval_dataset` by client the means over clients, weighted by examples.
        """
        self.client_evaluation = self.client_means = None
        if eval_dataset is not None and self.has_personal_models:
            raise ValueError(
                "Every client has a model of its own, so there is not one to evaluate on other data. Save that of a client with "
                "`save_client_model(client, folder)` and evaluate it, or call `evaluate()` for all clients."
            )
        if eval_dataset is not None or not self.evaluates_clients:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        held_out: Any = self.eval_dataset
        start, counts = time.time(), {}
        self.client_evaluation = {}
        try:
            for client in sorted(held_out):
                prepare = partial(self._prepare_held_out, held_out, client)
                prepared = recent(self._prepared_held_out, client, prepare, self._num_kept)
                self._live_adapter.write(self.client_state(client))
                output = self.evaluation_loop(
                    self.get_eval_dataloader(prepared),
                    description=f"Evaluation of {client}",
                    prediction_loss_only=True if self.compute_metrics is None else None,
                    ignore_keys=ignore_keys,
                    metric_key_prefix=metric_key_prefix,
                )
                self.client_evaluation[client] = self._figures_of_client(output.metrics or {}, metric_key_prefix)
                counts[client] = output.num_samples or 0
        finally:
            self._live_adapter.write(self._global_state)
        metrics = self._means_of_clients(self.client_evaluation, counts)
        metrics |= speed_metrics(metric_key_prefix, start, num_samples=sum(counts.values()))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def take_side_metrics(self) -> dict[str, float]:
        """What the trainer underneath has measured along in the last evaluation, by whole names."""
        raise NotImplementedError

    def _figures_of_client(self, metrics: dict[str, Any], prefix: str) -> dict[str, Any]:
        """What was measured of the client's model; what the user computes comes before what the trainer underneath measures along."""
        side = {name: value for name, value in self.take_side_metrics().items() if name not in metrics}
        return without_speed(metrics | side, prefix)

    def _means_of_clients(self, figures: dict[str, dict[str, Any]], counts: dict[str, int]) -> dict[str, Any]:
        """The means over clients, weighted by examples; of what some clients lack, over the others, with a warning."""
        self.client_means = means_over_clients(figures, counts)
        for name, clients in self.client_means.without.items():
            what = ", ".join(f"{client!r}: {value}" for client, value in list(clients.items())[:5])
            logger.warning(
                f"{name} is the mean over {self.client_means.num_clients[name]} of {len(figures)} clients; it is no number at "
                f"{what}{', ...' if len(clients) > 5 else ''}"
            )
        return dict(self.client_means.means)
