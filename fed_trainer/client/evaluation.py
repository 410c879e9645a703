# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""Whose model is evaluated: the global one, or that of a client, on its own held-out data."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import TrainerControl
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput, speed_metrics
from transformers.utils import logging

from ..data.client_datasets import recent
from ..data.held_out import is_by_client
from ..federation.rounds import Federation
from ..output.figures import ClientMeans, means_over_clients, without_speed
from ..state.adapter_state import AdapterState
from ..state.client_errors import ClientError, public_reason
from .agreement import AgreementMixin
from .data import ClientData
from .live.state import LiveState


__all__ = ["ClientEvaluationMixin"]

logger = logging.get_logger(__name__)


class ClientEvaluationMixin(AgreementMixin):
    """
    Where `eval_dataset` is a dictionary by client, each is evaluated with the model of that client: the global
    one, with the tensors that the client keeps. Where there is no model for all, whatever uses the live model
    says whose it is.
    """

    _live_adapter: LiveState
    federation: Federation
    _data: ClientData
    _clients: Mapping[str, Dataset]
    _prepared_held_out: dict[str, Dataset]
    # what is counted over the run, and no figure of a client
    _progress_figures: frozenset[str] = frozenset({"epoch", "num_input_tokens_seen"})
    _owner: str | None = None  # the client whose model the live one is at present; none: it is the global one
    client_evaluation: dict[str, dict[str, Any]] | None = None
    """Figures of the last evaluation by client; `None` if it was not one by client."""
    client_means: ClientMeans | None = None
    """The means of it, with the number of clients that had each figure."""

    def client_state(self, client: str) -> AdapterState:
        """What the model of a client is made of."""
        raise NotImplementedError

    def _prepare_held_out_dataset(self, dataset: Dataset, client: str) -> Dataset:
        """Tokenise one client's held-out data."""
        raise NotImplementedError

    @property
    def has_personal_models(self) -> bool:
        """Whether clients keep a part of their model, so that there is none for all."""
        raise NotImplementedError

    @property
    def evaluates_clients(self) -> bool:
        """Whether `eval_dataset` is by client."""
        return is_by_client(self.eval_dataset, self._clients)

    @contextmanager
    def client_model(self, client: str) -> Iterator[Any]:
        """
        Within, the live model is that of a client: the global one, with the tensors that the client keeps, or its own
        (Ditto). `predict`, `evaluate` and the model itself are then those of the client.

        Args:
            client (`str`):
                Name of the client. One that has not trained yet has the global model.

        Returns:
            The live model, `trainer.model`; afterwards it is the global one again.

        Raises:
            ValueError: If there is no such client, or within the model of another.
            RuntimeError: In the middle of a local round.

        Example:

        ```python
        >>> with trainer.client_model("ward_1"):
        ...     output = trainer.predict(rows)
        ```
        """
        if client not in self._clients:
            raise ValueError(f"There is no client {client!r}. The clients are {sorted(self._clients)}.")
        if self._owner is not None:
            raise ValueError(
                f"The live model is that of client {self._owner!r}, so it cannot be that of {client!r} too. Leave its "
                "`client_model` first."
            )
        if self.is_in_train:
            raise RuntimeError(
                "The live model is in training, where another cannot take its place. Use `client_model` between "
                "rounds, as in `on_evaluate` or `on_log`."
            )
        try:
            self._live_adapter.write(self.client_state(client))
            self._owner = client
            yield self.model
        finally:
            self._owner = None
            self._live_adapter.write(self.federation.state)

    # The doors to the live model

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **kwargs: Any,
    ) -> dict[str, float]:
        """
        As the base trainer's `evaluate`, with its keywords; for an `eval_dataset` by client the means over clients,
        weighted by examples.

        Args:
            eval_dataset (`Dataset` or `dict[str, Dataset]` or `str`, *optional*):
                Other held-out data than the trainer's, or the name of one of the trainer's sets. The name of a client
                gives the figures of that client's model on its data.
            ignore_keys, metric_key_prefix, kwargs:
                As for the base trainer.

        Raises:
            ValueError: If there is no model for all, and none of a client was asked for.
        """
        self.client_evaluation = self.client_means = None
        options = {"ignore_keys": ignore_keys, **kwargs}
        if eval_dataset is None and self.evaluates_clients:
            if self._owner is None:
                return self._evaluate_clients(metric_key_prefix, options)
            eval_dataset = self._owner
        if isinstance(eval_dataset, str) and self.evaluates_clients and self._owner is None:
            self._check_held_out_name(eval_dataset)
            return self._evaluate_client(eval_dataset, metric_key_prefix, options)
        self._refuse_without_owner("evaluate on this data")
        sets = self.eval_dataset if eval_dataset is None else eval_dataset
        # `Trainer` drops keywords where it takes several sets apart, and takes apart dictionaries only
        if isinstance(sets, Mapping) and (kwargs or not isinstance(sets, dict)):
            each = {name: name if eval_dataset is None else rows for name, rows in sets.items()}
            metrics: dict[str, float] = {}
            for name, rows in each.items():
                metrics |= self.evaluate(rows, metric_key_prefix=f"{metric_key_prefix}_{name}", **options)
            return metrics
        return super().evaluate(eval_dataset, metric_key_prefix=metric_key_prefix, **options)

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
        **kwargs: Any,
    ) -> PredictionOutput:
        """
        As the base trainer's `predict`, with its keywords. For predictions of a client's model, call it within
        `client_model`.

        Raises:
            ValueError: If there is no model for all, and this is not within `client_model`.
        """
        self._refuse_without_owner("predict with")
        return super().predict(test_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As [`~transformers.Trainer.evaluation_loop`], on a model that is somebody's."""
        self._refuse_without_owner("evaluate")
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        """As the base trainer's `prediction_step`, on a model that is somebody's."""
        self._refuse_without_owner("predict with")
        return super().prediction_step(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """
        As [`~transformers.Trainer.get_eval_dataloader`]; the name of a client gives its held-out data, prepared.

        Raises:
            ValueError: If there are several held-out sets and none of them was named.
        """
        if isinstance(eval_dataset, str):
            self._check_held_out_name(eval_dataset)
            if self.evaluates_clients:
                eval_dataset = self._held_out_of(eval_dataset)
        elif eval_dataset is None and isinstance(self.eval_dataset, Mapping):
            raise ValueError(
                f"There are {len(self.eval_dataset)} held-out sets, of which a loader takes one. Name it, such as "
                f"{next(iter(self.eval_dataset))!r}."
            )
        return super().get_eval_dataloader(eval_dataset)

    def _refuse_without_owner(self, use: str) -> None:
        if self.has_personal_models and self._owner is None:
            raise ValueError(
                f"Every client has a model of its own, so there is not one to {use}. Within "
                "`with trainer.client_model(client):` the live model is that of a client; `evaluate()` takes all "
                "clients in turn; `save_client_model(client, folder)` saves one."
            )

    def _check_held_out_name(self, name: str) -> None:
        names = list(self.eval_dataset) if isinstance(self.eval_dataset, Mapping) else []
        if name not in names:
            known = f"the held-out sets are {names}" if names else "the held-out data has no names"
            raise ValueError(f"There is no held-out set {name!r}: {known}. Pass one of them, or a `Dataset`.")

    # Evaluation by client

    def _evaluate_client(self, client: str, prefix: str, options: dict[str, Any]) -> dict[str, float]:
        name: Any = client  # `get_eval_dataloader` knows it
        with self.client_model(client):
            return super().evaluate(name, metric_key_prefix=prefix, **options)

    def evaluate_state(self, client: str, state: AdapterState) -> tuple[dict[str, Any], int]:
        """
        The figures of a state on the held-out data of a client, for a coordinator elsewhere, and the number of
        examples.

        Raises:
            ClientError: If the client has none that can be used.
        """
        held_out: Any = self.eval_dataset
        if not self.evaluates_clients or client not in held_out:
            raise ClientError(f"Client {client!r} has no held-out data.")
        count = len(self._held_out_of(client))
        name: Any = client
        try:
            self._live_adapter.write(state)
            self._owner = client
            with self._quietly():
                figures = super().evaluate(name, metric_key_prefix="eval")
        finally:
            self._owner = None
        return self._figures_of_model(figures, "eval"), count

    def enter_evaluation(
        self, by_client: dict[str, dict[str, Any]], counts: Mapping[str, int | None]
    ) -> dict[str, float] | None:
        """
        Take over what clients elsewhere have measured, as an evaluation by client; `None` if none has.

        Args:
            by_client (`dict[str, dict[str, Any]]`):
                Figures by client; empty for one that has none.
            counts (`dict[str, int]`):
                Number of held-out examples by client; `None` for one that does not say it.
        """
        if not any(by_client.values()):
            return None
        return self._enter(by_client, {client: count for client, count in counts.items() if count != 0}, {})

    def _evaluate_clients(self, prefix: str, options: dict[str, Any]) -> dict[str, float]:
        held_out: Any = self.eval_dataset
        start, counts = time.time(), {}
        by_client: dict[str, dict[str, Any]] = {}
        for client in sorted(held_out):
            try:
                with self._failing_together(
                    f"The held-out data of client {client!r} could not be prepared in another process."
                ):
                    counts[client] = len(self._held_out_of(client))
            except ClientError as error:
                self._all_have_stopped = False
                counts.pop(client, None)
                by_client[client] = {}
                if not any(by_client.values()) and len(by_client) == len(held_out):
                    raise
                logger.warning(f"{error} The means are over the other clients.")
                continue
            with self._quietly():
                figures = self._evaluate_client(client, prefix, options)
            by_client[client] = self._figures_of_model(figures, prefix)
        return self._enter(by_client, counts, speed_metrics(prefix, start, num_samples=sum(counts.values())))

    def _figures_of_model(self, figures: dict[str, float], prefix: str) -> dict[str, Any]:
        """Of the figures of an evaluation those of the model."""
        counted = {name for figure in self._progress_figures for name in (figure, f"{prefix}_{figure}")}
        return {key: value for key, value in without_speed(figures, prefix).items() if key not in counted}

    def _enter(
        self, by_client: dict[str, dict[str, Any]], counts: Mapping[str, int | None], speed: dict[str, float]
    ) -> dict[str, float]:
        """Log the means of an evaluation by client, and report them."""
        means = means_over_clients(by_client, counts)
        _warn_of_partial_means(means, len(by_client))
        self.client_evaluation, self.client_means = by_client, means
        metrics = dict(means.means) | speed
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.client_evaluation, self.client_means = by_client, means  # callbacks may have evaluated something else
        return metrics

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        """Within, an evaluation is a part of another: it is neither logged nor reported."""
        handler, history = self.callback_handler, self.state.log_history
        length = len(history)
        self.callback_handler = quiet = _QuietCallbackHandler(handler)
        try:
            yield
        finally:
            self.callback_handler, handler.eval_dataloader = handler, quiet.eval_dataloader
            del history[length:]

    def _held_out_of(self, client: str) -> Dataset:
        held_out: Any = self.eval_dataset
        prepare = partial(self._prepare_held_out, held_out, client)
        return recent(self._prepared_held_out, client, prepare, self._data.num_kept)

    def _prepare_held_out(self, held_out: Mapping[str, Dataset], client: str) -> Dataset:
        try:
            prepared = self._prepare_held_out_dataset(held_out[client], client)
        except Exception as error:
            raise ClientError(
                f"The held-out data of client {client!r} cannot be prepared: {public_reason(error)}. Correct it, "
                "or leave the client out of `eval_dataset`."
            ) from error
        if len(prepared) == 0:
            raise ClientError(
                f"Of the held-out data of client {client!r} nothing is left after preparation: no label of it is "
                "within `max_length`. Raise it, or leave the client out of `eval_dataset`."
            )
        return prepared


def _warn_of_partial_means(means: ClientMeans, num_clients: int) -> None:
    for name, clients in means.without.items():
        what = ", ".join(f"{client!r}: {value}" for client, value in list(clients.items())[:5])
        logger.warning(
            f"{name} is the mean over {means.num_clients[name]} of {num_clients} clients; it is no number at "
            f"{what}{', ...' if len(clients) > 5 else ''}"
        )


class _QuietCallbackHandler(CallbackHandler):
    """Passes on the steps of an evaluation, and not what it has come to."""

    def __init__(self, handler: CallbackHandler) -> None:
        vars(self).update(vars(handler))

    def call_event(self, event: str, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        return super().call_event(event, args, state, control, **kwargs) if event == "on_prediction_step" else control
