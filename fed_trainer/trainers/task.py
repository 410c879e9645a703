# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import Trainer

from ..client.loss_probe import LossProbeMixin, states_its_loss
from ..config import FederatedTaskConfig, FederationArguments
from .mixin import FederatedMixin
from .refusals.data import check_model_columns, held_out_sets


__all__ = ["FederatedTaskTrainer"]


class FederatedTaskTrainer(FederatedMixin, LossProbeMixin, Trainer):
    """
    Federated training for classification and the like: a [`~transformers.Trainer`] whose training data is spread over
    clients.

    Without a `peft_config`, a plain model is trained as `Trainer` does it: every parameter that requires
    gradients travels, and whole models are saved. That is full fine-tuning, or BitFit if only the biases and the
    head require gradients.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model. A new head is drawn at random when the model is made: call `set_seed` before, so that the
            same script trains the same model. Resuming does not need it: the trained head is in the checkpoint.
        args ([`FederatedTaskConfig`]):
            Settings of the federation and of the local rounds.
        train_dataset (`Mapping[str, Dataset]`):
            Training data by client, tokenised (or processed) as for `Trainer`.
        eval_dataset (`Dataset` or `dict[str, Dataset]`, *optional*):
            Held-out data on which the global model is evaluated.
        peft_config ([`~peft.PeftConfig`], *optional*):
            The adapter to train. With `task_type="SEQ_CLS"` PEFT trains the classification head along; it is
            averaged and saved with the adapter. Modules of other names belong into `modules_to_save`.
        kwargs (`dict[str, Any]`, *optional*):
            Further arguments of `Trainer`: `processing_class`, `data_collator`, `compute_metrics`, `callbacks`,
            ... The figures of `compute_metrics` stand beside the loss in the log, the record, the report and
            the model card.

    Raises:
        ValueError: For an empty or too small client, data that is not tokenised, more clients per round than there
            are, an adapter of another base model; the message says what to do.

    Example:

    ```python
    >>> from fed_trainer import FederatedTaskConfig, FederatedTaskTrainer, dirichlet_partition
    >>> from peft import LoraConfig
    >>> from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

    >>> tokenizer = AutoTokenizer.from_pretrained("FacebookAI/roberta-base")
    >>> rows = dataset.map(lambda rows: tokenizer(rows["text"], truncation=True), batched=True)
    >>> set_seed(0)
    >>> trainer = FederatedTaskTrainer(
    ...     model=AutoModelForSequenceClassification.from_pretrained("FacebookAI/roberta-base", num_labels=77),
    ...     args=FederatedTaskConfig(
    ...         output_dir="out", num_rounds=20, clients_per_round=5, max_steps=10, learning_rate=1e-3
    ...     ),
    ...     train_dataset=dirichlet_partition(rows["train"], num_clients=10, alpha=0.1, column="label"),
    ...     eval_dataset=rows["test"],
    ...     processing_class=tokenizer,
    ...     peft_config=LoraConfig(r=8, task_type="SEQ_CLS"),
    ... )
    >>> trainer.train()
    ```
    """

    _kind = "task"
    _config_class: type[FederationArguments] = FederatedTaskConfig

    def __init__(
        self,
        model: str | nn.Module | None,
        args: FederationArguments,
        train_dataset: Mapping[str, Dataset] | Dataset | None = None,
        eval_dataset: Dataset | Mapping[str, Dataset] | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, train_dataset, eval_dataset, peft_config, **kwargs)
        is_one_batch = self.args.world_size * self.args.gradient_accumulation_steps == 1
        counts = self.model_accepts_loss_kwargs and self.compute_loss_func is None
        # a coordinator has no data to ask, and does not train
        self._asks_the_loss = bool(self._clients) and counts and not is_one_batch and not states_its_loss(self.model)

    def _build_engine(self) -> None:
        super()._build_engine()
        self._look_at_the_loss()

    def _check_clients(self, clients: Mapping[str, Dataset], eval_dataset: Any, model: Any, **kwargs: Any) -> None:
        if not self.args.remove_unused_columns:  # whatever the columns are, the collator gets them
            return
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        inputs = set(inspect.signature(base.forward).parameters)
        check_model_columns(clients, inputs, type(base).__name__)
        for name, dataset in held_out_sets(eval_dataset).items():
            check_model_columns({name: dataset}, inputs, type(base).__name__, kind="Held-out set")
