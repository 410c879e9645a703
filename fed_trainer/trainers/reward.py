# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from datasets import Dataset
from peft import PeftConfig, PeftModel, TaskType
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers.utils import logging
from trl import RewardTrainer

from ..config import FederatedRewardConfig, FederationArguments
from .trl import TRLMixin


__all__ = ["FederatedRewardTrainer"]

logger = logging.get_logger(__name__)


class FederatedRewardTrainer(TRLMixin, RewardTrainer):
    """
    Federated training of a reward model: a [`~trl.RewardTrainer`] whose preferences are spread over clients.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Base model, as in `RewardTrainer`. One that has no head for a reward gets a random one, the same for a
            seed.
        args ([`FederatedRewardConfig`]):
            Settings of the federation and of the local rounds.
        train_dataset (`Mapping[str, Dataset]`):
            Preferences by client, in any format that `RewardTrainer` takes: `chosen` and `rejected`, with or
            without a `prompt`, as texts or messages, or tokenised.
        eval_dataset (`Dataset` or `dict[str, Dataset]`, *optional*):
            Held-out preferences on which the global model is evaluated.
        peft_config ([`~peft.PeftConfig`], *optional*):
            The adapter to train, if `model` is no `PeftModel` and there is no `args.initial_adapter`. With
            `task_type="SEQ_CLS"` PEFT trains the head (`score`) along; it is averaged and saved with the adapter. A
            new head needs that: it is refused without, or warned of if `model` was passed loaded.
        kwargs (`dict[str, Any]`, *optional*):
            Further arguments of `RewardTrainer`: `processing_class`, `data_collator`, `callbacks`, ...

    Raises:
        ValueError: As [`FederatedTrainer`], for columns without pairs of answers, and for an adapter of another
            task or that would lose a new head; the message says what to do.

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
    _side_metrics = frozenset({"num_tokens", "min_reward", "mean_reward", "max_reward"})
    _preference_formats = ({"chosen", "rejected"}, {"chosen_ids", "rejected_ids"})
    _kind = "reward"
    _stub_row = MappingProxyType({"chosen": "A", "rejected": "B"})
    args: FederatedRewardConfig

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
        if isinstance(self.model, PeftModel):
            self._refuse_to_lose_a_head(self.model.get_base_model(), was_loaded_here=isinstance(model, str))

    def _prepare_client_dataset(self, dataset: Dataset, client: str) -> Dataset:
        return self._prepare_as_trl(dataset, client)

    # Refusals

    def _model_arguments(self, model: str | nn.Module | None, peft_config: PeftConfig | None) -> dict[str, Any]:
        config: Any = model.active_peft_config if isinstance(model, PeftModel) else peft_config
        if config is not None and config.task_type not in (None, TaskType.SEQ_CLS):
            raise ValueError(
                f"The adapter has `task_type={str(TaskType(config.task_type).value)!r}`, but a reward model is a "
                "sequence classifier with one output. Set `task_type='SEQ_CLS'`, with which PEFT trains its head "
                "along; an adapter of a language model has to be merged into that first (`merge_and_unload`)."
            )
        return super()._model_arguments(model, peft_config)

    def _refuse_to_lose_a_head(self, base: Any, was_loaded_here: bool) -> None:
        """
        A head at random, which is neither in the adapter nor in the checkpoint of the base model, could not be had
        again.
        """
        if type(base).__name__ in (base.config.architectures or []):  # of the checkpoint: it has the head
            return
        heads = [name for name, module in base.named_children() if name in SEQ_CLS_HEAD_NAMES]
        lost = [name for name in heads if not isinstance(base.get_submodule(name), ModulesToSaveWrapper)]
        if not lost:
            return
        what = (
            f"The head `{lost[0]}` was not loaded from a trained classifier, and the adapter neither trains nor "
            "saves it"
        )
        line = f"`task_type='SEQ_CLS'`, or `modules_to_save=[{lost[0]!r}]`,"
        if was_loaded_here:
            raise ValueError(
                f"{what}: it is random, and nobody who loads the adapter would have it. Write {line} in the "
                "`peft_config`."
            )
        logger.warning(
            f"{what}. Keep the `{type(base).__name__}` that was passed, without which the adapter gives other "
            f"rewards, or write {line} in the `peft_config`."
        )
