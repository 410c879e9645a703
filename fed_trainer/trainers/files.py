# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What a run puts into a folder and onto the Hub."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import PreTrainedModel
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging
from trl.trainer.utils import get_config_model_id

from peft_scl.foreign_files import read_json

from ..output.card import model_card
from ..output.digests import TRAINER_STATE_NAME, write_digests
from ..output.hub import publish
from ..output.owned import remove_own_files
from ..output.published import Openings, clients_between, published_log, published_record
from ..output.record import RECORD_NAME, peft_type_name
from ..output.saved_files import fresh_folder, move_into_place, raise_contents, remove_superseded, saved_shapes


__all__ = ["CARD_NAME", "RunFiles", "active_config"]

logger = logging.get_logger(__name__)

CARD_NAME = "README.md"


class RunFiles:
    """
    Saving, model card and publishing of a federation; nothing is pickled.

    Args:
        trainer ([`FederatedMixin`]):
            The trainer.
        folder (`Path`):
            The folder of the run.
    """

    def __init__(self, trainer: Any, folder: Path) -> None:
        self._trainer, self.folder = trainer, folder
        self.saved_names: Sequence[str] = ()
        """What the last save has written: paths of the model and of what is needed to load it."""
        self.published_round = 0
        """The round after which the model was published last."""
        self._is_warned = False

    def save(self, folder: Path, weights: dict[str, torch.Tensor] | None) -> None:
        """Write what a run ends with into any folder, in place of what an earlier save has written there."""
        self.write(folder, weights)
        remove_superseded(folder, self.saved_names)
        write_digests(folder, self.saved_names)

    def weights_to_save(self) -> dict[str, torch.Tensor] | None:
        """
        What `write_weights` needs: the whole adapter for a LoRA that holds base changes, or the state dict of a
        model.
        """
        trainer = self._trainer
        if trainer._base_changes is not None:
            return trainer._live_adapter.read(include_frozen=True)
        # then the model holds parts or rounded copies
        return trainer._live_adapter.model_state_dict(trainer.model) if trainer._engine.holds_weights else None

    def write(self, folder: Path, weights: dict[str, torch.Tensor] | None) -> None:
        """
        Write the model, what is needed to load it, the record and the card; `saved_names` are the files of the first
        two.
        """
        trainer = self._trainer
        with fresh_folder(folder) as beside:
            self.write_weights(beside, weights)
            if trainer.processing_class is not None:
                # the chat template goes into the JSON, as in the tokenizers that older versions load
                trainer.processing_class.save_pretrained(str(beside), save_jinja_files=False)
            self.saved_names = move_into_place(beside, folder)
        trainer._run_record.write(folder)
        self.card().save(folder / CARD_NAME)

    def write_weights(self, folder: Path, weights: dict[str, torch.Tensor] | None) -> None:
        """
        Write the model into an empty folder.

        Raises:
            ValueError: If the files lack something that is trained.
        """
        trainer = self._trainer
        if trainer._base_changes is not None:
            assert weights is not None
            trainer._base_changes.to_lora(weights).save_pretrained(folder)
            lacking = trainer._base_changes.lacking(saved_shapes(folder))
        else:
            with trainer._live_adapter.publishable():
                if isinstance(trainer.model, PeftModel):
                    # of several adapters, such as the reference of DPO, only the one that is trained
                    name = trainer.model.active_adapters[0]
                    trainer.model.save_pretrained(str(folder), state_dict=weights, selected_adapters=[name])
                    if name != "default":
                        raise_contents(folder, name)
                else:
                    trainer.model.save_pretrained(str(folder), state_dict=weights)
            lacking = trainer._live_adapter.lacking(saved_shapes(folder))
        remove_own_files(folder, [CARD_NAME])  # PEFT's
        if lacking is not None:
            raise ValueError(
                f"What `save_pretrained` of {type(trainer.model).__name__} has written is not what is trained: "
                f"{lacking}. Nothing was saved in its place. Another library may have changed the model or how it is "
                "saved: leave it out, or report it."
            )

    def publish(
        self, folder: Path, commit_message: str | None, token: str | None, revision: str | None, blocking: bool = True
    ) -> Any:
        """Upload what the last save has written into `folder`, with the record and the log as they are published."""
        trainer = self._trainer
        openings = self._openings
        contents = {RECORD_NAME: published_record(trainer.record, openings)}
        if (folder / TRAINER_STATE_NAME).is_file():
            state = read_json(folder / TRAINER_STATE_NAME)
            contents[TRAINER_STATE_NAME] = published_log(state, trainer.record, openings)
        documents = {name: json.dumps(content, indent=1) + "\n" for name, content in contents.items()}
        rounds = trainer.record["rounds"]
        behind = clients_between(trainer.record, self.published_round)
        if len(behind) == 1 and not self._is_warned:
            logger.warning(
                f"Round {rounds[-1]['round']} is published, and the difference from what was published before is "
                "the update of a single client. Whoever has both has the update. Let more clients count in a round, "
                "or publish less often (`save_rounds`)."
            )
        self.published_round = rounds[-1]["round"] if rounds else 0
        names = [*self.saved_names, CARD_NAME]
        repository = trainer.hub_model_id
        return publish(folder, names, documents, repository, commit_message, token, revision, blocking, self.folder)

    def warn_of_single_clients(self) -> None:
        """At the start of a run each of whose rounds is going to be the update of a client, for all to see."""
        if self.publishes_rounds and self._trainer.sampler.num_sampled == 1 and self._trainer.is_world_process_zero():
            logger.warning(
                "Each round has a single client and is published, so the difference of two published rounds is the "
                "update of a client. Raise `clients_per_round`, or set `hub_strategy='end'`."
            )
            self._is_warned = True

    @property
    def publishes_rounds(self) -> bool:
        """Whether rounds are published before the last one."""
        return self._trainer.args.push_to_hub and self._trainer.args.hub_strategy != HubStrategy.END

    @property
    def _openings(self) -> Openings:
        args = self._trainer.args
        return Openings(args.publish_client_names, args.publish_client_metrics, args.publish_label_counts)

    def card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: list[str] | None = None
    ) -> ModelCard:
        """The model card of what is published; the arguments are those of TRL's trainers."""
        trainer = self._trainer
        base = get_config_model_id(trainer.model.config)
        peft_config = active_config(trainer.model)
        record = trainer.record
        if trainer._base_changes is not None:  # what is published is a LoRA, whatever was trained
            record = {**record, "peft_type": peft_type_name(LoraConfig())}
        return model_card(
            published_record(record, self._openings),
            peft_config.task_type if peft_config is not None else None,
            trainer.hub_model_id,
            base if base and not os.path.isdir(base) else None,
            model_name,
            dataset_name,
            tags,
            model_class=type(
                trainer.model.get_base_model() if isinstance(trainer.model, PeftModel) else trainer.model
            ).__name__,
            num_labels=getattr(trainer.model.config, "num_labels", None),
        )


def active_config(model: PeftModel | PreTrainedModel) -> PeftConfig | None:
    """The PEFT config of the adapter that is trained; `None` for a plain model."""
    return model.peft_config[model.active_adapters[0]] if isinstance(model, PeftModel) else None
