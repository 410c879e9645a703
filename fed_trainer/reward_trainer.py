# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from datasets import Dataset
from trl import RewardTrainer

from .config import FederatedRewardConfig
from .trl_mixin import TRLMixin


__all__ = ["FederatedRewardTrainer"]


class FederatedRewardTrainer(TRLMixin, RewardTrainer):
    """
    Federated training of a reward model: a [`~trl.RewardTrainer`] whose preferences are spread over clients.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Base model, as in `RewardTrainer`. One that has no head for a reward gets a random one, the same for a seed.
        args ([`FederatedRewardConfig`]):
            Settings of the federation and of the local rounds.
        train_dataset (`Mapping[str, Dataset]`):
            Preferences by client, in any format that `RewardTrainer` takes: `chosen` and `rejected`, with or without a `prompt`,
            as texts or messages, or tokenised.
        eval_dataset (`Dataset` or `dict[str, Dataset]`, *optional*):
            Held-out preferences on which the global model is evaluated.
        peft_config ([`~peft.PeftConfig`], *optional*):
            The adapter to train, if `model` is no `PeftModel` and there is no `args.initial_adapter`. With `task_type="SEQ_CLS"`
            PEFT trains the head (`score`) along; it is averaged and saved with the adapter. A new head needs that.
        kwargs (`dict[str, Any]`, *optional*):
            Further arguments of `RewardTrainer`: `processing_class`, `data_collator`, `callbacks`, ...

    Raises:
        ValueError: As [`FederatedTrainer`], and for columns without pairs of answers; the message says what to do.

    Example:

    ```python
    >>> from fed_trainer import FederatedRewardConfig, FederatedRewardTrainer, natural_partition
    >>> from peft import LoraConfig

    >>> trainer = FederatedRewardTrainer(
    ...     model="HuggingFaceTB/SmolLM2-135M",
    ...     args=FederatedRewardConfig(output_dir="out", num_rounds=10, max_steps=10, learning_rate=1e-4),
    ...     train_dataset=natural_partition(preferences, column="annotator"),
    ...     eval_dataset=held_out,
    ...     peft_config=LoraConfig(r=16, task_type="SEQ_CLS"),
    ... )
    >>> trainer.train()
    ```
    """

    _config_class = FederatedRewardConfig
    _preference_formats = ({"chosen", "rejected"}, {"chosen_ids", "rejected_ids"})
    args: FederatedRewardConfig

    def _prepare_client_dataset(self, dataset: Dataset, client: str) -> Dataset:
        return self._prepare_as_trl(dataset, client)
