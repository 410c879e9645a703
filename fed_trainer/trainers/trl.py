# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What the federated trainers over TRL's have in common: TRL loads and wraps the model, and tokenises."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import datasets
from datasets import Dataset
from peft import PeftConfig, PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from ..client.put_back import PutBack
from ..config import given
from ..output.record import peft_type_name
from .mixin import FederatedMixin
from .refusals.data import check_preference_columns, held_out_sets


__all__ = ["TRLMixin", "refuse_without_log_probs"]


_WITHOUT_LOG_PROBS = {
    "ADAPTION_PROMPT": "it keeps the model's forward from before. Train it with `FederatedTaskTrainer`, on "
    "tokenised data",
    "CPT": "it computes a loss of its own from the logits. Use PROMPT_TUNING",
}


class TRLMixin(FederatedMixin):
    """[`FederatedMixin`] for the trainers of TRL."""

    _takes_torch_datasets = False
    _name: str  # TRL's, as in "DPO"
    # with the tokens that this process has been trained on, which TRL logs with an evaluation
    _progress_figures = FederatedMixin._progress_figures | {"num_tokens"}
    # of a trainer on pairs of answers: the columns that it needs, by format
    _preference_formats: Sequence[set[str]] = ()
    _metrics: dict[str, Any]
    _total_train_tokens: int

    def _check_clients(self, clients: Mapping[str, Dataset], eval_dataset: Any, model: Any, **kwargs: Any) -> None:
        trainer = f"{self._name}Trainer"
        if "tokens" in given(self.args, "aggregation_kwargs").values():
            raise ValueError(
                f"`aggregation_kwargs` weights clients by their tokens, but the loss of `{trainer}` is one of "
                "pairs of answers, not of tokens. Weight by 'examples', or all alike ('uniform')."
            )
        check_preference_columns(clients, self._preference_formats, trainer)
        for name, dataset in held_out_sets(eval_dataset).items():
            check_preference_columns({name: dataset}, self._preference_formats, trainer, kind="Held-out set")

    def _check_model(self) -> None:
        super()._check_model()
        model: Any = self.model
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else None
        head = None if base is None else base.get_output_embeddings()
        if isinstance(head, AuxiliaryTrainingWrapper) and not isinstance(head, ModulesToSaveWrapper):
            raise ValueError(
                f"`trainable_token_indices` on embeddings that are tied to the output layer: {self._name}Trainer "
                "of TRL multiplies by the weight of that layer itself (`fused_lm_head`), past the rows that are "
                "trained. Train them with `FederatedTaskTrainer`, on tokenised data with labels, or take a base "
                "model whose embeddings are not tied."
            )

    def _model_arguments(self, model: str | nn.Module | None, peft_config: PeftConfig | None) -> dict[str, Any]:
        # a copy: for a reward model PEFT adds the head to `modules_to_save` of the config, each time it gets it
        return {"model": model, "peft_config": copy.deepcopy(peft_config)}

    def _remember_figures(self) -> PutBack:
        put_back_those_of_trainer = super()._remember_figures()
        metrics, tokens = copy.deepcopy(self._metrics), self._total_train_tokens

        def put_back() -> None:
            put_back_those_of_trainer()
            self._metrics, self._total_train_tokens = metrics, tokens

        return put_back

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        """As TRL's, except for the row that the trainer is made with: clients are prepared one like another."""
        if dataset is self._first_look:
            return dataset
        return super()._prepare_dataset(dataset, *args, **kwargs)  # type: ignore[misc]

    def _prepare_as_trl(self, dataset: Dataset, client: str, *options: Any) -> Dataset:
        """
        One client's data as the trainer prepares its own; `options` are what it asks for between `args` and a name.
        """
        with _without_dataset_bars():
            return self._prepare_dataset(dataset, self.processing_class, self.args, *options, f"client {client}")


def refuse_without_log_probs(trainer: str, model: str | nn.Module | None, peft_config: PeftConfig | None) -> None:
    """
    Refuse an adapter with which TRL cannot compute log-probabilities.

    Raises:
        ValueError: Naming its type.
    """
    config = model.active_peft_config if isinstance(model, PeftModel) else peft_config
    kind = None if config is None else peft_type_name(config)
    if kind in _WITHOUT_LOG_PROBS:
        raise ValueError(
            f"TRL's {trainer} asks the model for log-probabilities (`fused_lm_head`), which {kind} does not give: "
            f"{_WITHOUT_LOG_PROBS[kind]}."
        )


@contextmanager
def _without_dataset_bars() -> Iterator[None]:
    """Four bars per client would bury the bar over rounds."""
    were_on = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_on:
            datasets.enable_progress_bars()
