# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel
from trl import SFTTrainer

from ..config import FederatedConfig
from .refusals.data import check_same_columns, check_sft_columns, held_out_sets
from .trl import TRLMixin, refuse_without_log_probs


__all__ = ["FederatedTrainer"]


class FederatedTrainer(TRLMixin, SFTTrainer):
    """
    Federated supervised fine-tuning: a [`~trl.SFTTrainer`] whose training data is spread over clients.

    Without a `peft_config`, a plain model is trained as `SFTTrainer` does it: every parameter that requires gradients
    travels, and whole models are saved. That is full fine-tuning, or BitFit if only the biases require gradients.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Base model, as in `SFTTrainer`. It is loaded once and stays alive over all clients and rounds.
        args ([`FederatedConfig`]):
            Settings of the federation and of the local rounds.
        train_dataset (`Mapping[str, Dataset]`):
            Training data by client, in any format that `SFTTrainer` takes.
        eval_dataset (`Dataset` or `dict[str, Dataset]`, *optional*):
            Held-out data on which the global model is evaluated.
        peft_config ([`~peft.PeftConfig`], *optional*):
            The adapter to train, if `model` is no `PeftModel` and there is no `args.initial_adapter`.
        kwargs (`dict[str, Any]`, *optional*):
            Further arguments of `SFTTrainer`: `processing_class`, `data_collator`, `compute_metrics`, `callbacks`,
            `optimizer_cls_and_kwargs`, `formatting_func`, ... Callbacks see a round as a step of the run (`on_log`,
            `on_evaluate`, `on_save`), and the optimiser steps of all local rounds (`on_step_end`, ...).

    Raises:
        ValueError: For an empty or too small client, unknown columns, more clients per round than there are, an
            adapter of another base model; the message says what to do.

    Example:

    ```python
    >>> from fed_trainer import FederatedConfig, FederatedTrainer, dirichlet_partition
    >>> from peft_scl import SclConfig

    >>> trainer = FederatedTrainer(
    ...     model="HuggingFaceTB/SmolLM2-135M",
    ...     args=FederatedConfig(output_dir="out", num_rounds=15, clients_per_round=5, max_steps=10),
    ...     train_dataset=dirichlet_partition(dataset, num_clients=10, alpha=0.1, column="category"),
    ...     eval_dataset=held_out,
    ...     peft_config=SclConfig(r=16, task_type="CAUSAL_LM"),
    ... )
    >>> trainer.train()
    ```
    """

    _config_class = FederatedConfig
    _kind = "sft"
    _stub_row = MappingProxyType({"input_ids": [0]})
    _side_metrics = frozenset({"entropy", "mean_token_accuracy", "num_tokens"})
    args: FederatedConfig
    model: PeftModel | PreTrainedModel

    def _model_arguments(self, model: str | nn.Module | None, peft_config: PeftConfig | None) -> dict[str, Any]:
        refuse_without_log_probs("SFTTrainer", model, peft_config)
        return super()._model_arguments(model, peft_config)

    def _check_clients(self, clients: Mapping[str, Dataset], eval_dataset: Any, model: Any, **kwargs: Any) -> None:
        if kwargs.get("formatting_func") is not None:
            check_same_columns(clients)  # from which `SFTTrainer` tells images and completions all the same
            return
        check_sft_columns(clients, self.args.dataset_text_field)
        for name, dataset in held_out_sets(eval_dataset).items():
            check_sft_columns({name: dataset}, self.args.dataset_text_field, kind="Held-out set")

    def _prepare_client_dataset(self, dataset: Dataset, client: str) -> Dataset:
        return self._prepare_sft(dataset, client, self.args.packing)

    def _prepare_held_out_dataset(self, dataset: Dataset, client: str) -> Dataset:
        packing = self.args.packing if self.args.eval_packing is None else self.args.eval_packing
        return self._prepare_sft(dataset, client, packing)

    def _prepare_sft(self, dataset: Dataset, client: str, packing: bool) -> Dataset:
        if self._skip_prepare_dataset:  # images, or by `dataset_kwargs`
            return dataset
        return self._prepare_as_trl(dataset, client, packing, self._formatting_func)
