# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""What a run puts into a folder and onto the Hub."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging
from trl.trainer.utils import get_config_model_id

from peft_scl.foreign_files import read_json

from ..client.engines import Engine
from ..client.live.base_changes import BaseChanges
from ..client.live.state import LiveState
from ..config import FederationArguments
from ..federation.rounds import Federation
from ..federation.sampling import ClientSampler
from ..output.card import model_card
from ..output.digests import TRAINER_STATE_NAME, write_digests
from ..output.hub import publish
from ..output.owned import remove_own_files
from ..output.published import Openings, clients_between, published_log, published_record
from ..output.record import RECORD_NAME, WHOLE, RecordFiles, client_sizes, peft_fields, peft_type_name
from ..output.saved_files import fresh_folder, move_into_place, raise_contents, remove_superseded, saved_shapes
from ..output.settings import described_arguments, federation_settings, local_settings


__all__ = ["RunFilesMixin"]

logger = logging.get_logger(__name__)

CARD_NAME = "README.md"


class RunFilesMixin(Trainer):
    """Saving, model card, record and publishing of a federation; nothing is pickled."""

    args: FederationArguments
    model: PeftModel | PreTrainedModel
    sampler: ClientSampler
    hub_model_id: Any  # `None` until the repository exists
    _folder: Path
    _clients: Mapping[str, Dataset]
    _live_adapter: LiveState
    _engine: Engine
    federation: Federation
    _local_keys: set[str]
    _owner: str | None
    _base_digest: str | None  # of the base of an adapter; a plain model has none beside what is trained and saved
    _base_changes: BaseChanges | None
    _record: dict[str, Any]
    _record_files: RecordFiles
    _arguments: dict[str, Any]  # what the trainer was given, described
    _initial_digest: str | None  # of `initial_adapter`
    _saved_names: Sequence[str] = ()
    """What the last save has written: paths of the model and of what is needed to load it."""
    _published_round: int = 0
    """The round after which the model was published last."""
    _is_warned: bool = False

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As [`~transformers.Trainer.save_model`]. All processes have to call it; the first one writes."""
        self._refuse_within_client_model("save")
        self._save(output_dir, self._weights_to_save())
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _refuse_within_client_model(self, use: str) -> None:
        if self._owner is not None:
            raise ValueError(
                f"The live model is that of client {self._owner!r}, which is not the federation's to {use}. Leave "
                "`client_model` first; `save_client_model(client, folder)` saves the model of a client."
            )

    def _weights_to_save(self) -> dict[str, torch.Tensor] | None:
        """
        What `_save_weights` needs: the whole adapter for a LoRA that holds base changes, or the state dict of a model.
        """
        if self._base_changes is not None:
            return self._live_adapter.read(include_frozen=True)
        # then the model holds parts or rounded copies
        return self._live_adapter.model_state_dict(self.model) if self._engine.holds_weights else None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """As `Trainer._save`, without the pickled `training_args.bin` and with the record and the model card."""
        folder = Path(output_dir) if output_dir is not None else self._folder
        if not self.args.should_save:
            return
        self._save_files(folder, state_dict)
        remove_superseded(folder, self._saved_names)
        write_digests(folder, self._saved_names)

    def _save_files(self, folder: Path, weights: dict[str, torch.Tensor] | None) -> None:
        """
        Write the model, what is needed to load it, the record and the card; `_saved_names` are the files of the first
        two.
        """
        with fresh_folder(folder) as beside:
            self._save_weights(beside, weights)
            if self.processing_class is not None:
                # the chat template goes into the JSON, as in the tokenizers that older versions load
                self.processing_class.save_pretrained(str(beside), save_jinja_files=False)
            self._saved_names = move_into_place(beside, folder)
        self._write_record(folder)
        self._card().save(folder / CARD_NAME)

    def _save_weights(self, folder: Path, weights: dict[str, torch.Tensor] | None) -> None:
        """
        Write the model into an empty folder.

        Raises:
            ValueError: If the files lack something that is trained.
        """
        if self._base_changes is not None:
            assert weights is not None
            self._base_changes.to_lora(weights).save_pretrained(folder)
            lacking = self._base_changes.lacking(saved_shapes(folder))
        else:
            with self._live_adapter.publishable():
                if isinstance(self.model, PeftModel):
                    # of several adapters, such as the reference of DPO, only the one that is trained
                    name = self.model.active_adapters[0]
                    self.model.save_pretrained(str(folder), state_dict=weights, selected_adapters=[name])
                    if name != "default":
                        raise_contents(folder, name)
                else:
                    self.model.save_pretrained(str(folder), state_dict=weights)
            lacking = self._live_adapter.lacking(saved_shapes(folder))
        remove_own_files(folder, [CARD_NAME])  # PEFT's
        if lacking is not None:
            raise ValueError(
                f"What `save_pretrained` of {type(self.model).__name__} has written is not what is trained: "
                f"{lacking}. Nothing was saved in its place. Another library may have changed the model or how it "
                "is saved: leave it out, or report it."
            )

    def create_model_card(  # type: ignore[override]
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the model card of the federation to `output_dir`; the arguments are those of TRL's trainers."""
        if self.is_world_process_zero():
            tags = [tags] if isinstance(tags, str) else list(tags or [])
            self._card(model_name, dataset_name, tags).save(self._folder / CARD_NAME)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Publish the global adapter, what is needed to load it, its card, and of the record and the log what
        [`Openings`] let out.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`):
                Message of the commit.
            blocking (`bool`, *optional*, defaults to `True`):
                Whether to wait for the upload. If not, a future is returned.
            token (`str`, *optional*):
                Hub token; `args.hub_token` if not given.
            revision (`str`, *optional*):
                Branch to commit to; `args.hub_revision` if not given.
            private (`bool`, *optional*):
                Whether a new repository is private; `args.hub_private_repo` if not given.
            kwargs (`dict[str, Any]`, *optional*):
                Passed to [`~FederatedMixin.create_model_card`].
        """
        self._refuse_within_client_model("publish")
        token = token if token is not None else self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        revision = revision if revision is not None else self.args.hub_revision
        return self._publish(self._folder, commit_message, token, revision, blocking)

    def _publish(
        self, folder: Path, commit_message: str | None, token: str | None, revision: str | None, blocking: bool = True
    ) -> Any:
        """Upload what the last save has written into `folder`, with the record and the log as they are published."""
        openings = self._openings
        contents = {RECORD_NAME: published_record(self._record, openings)}
        if (folder / TRAINER_STATE_NAME).is_file():
            state = read_json(folder / TRAINER_STATE_NAME)
            contents[TRAINER_STATE_NAME] = published_log(state, self._record, openings)
        documents = {name: json.dumps(content, indent=1) + "\n" for name, content in contents.items()}
        rounds = self._record["rounds"]
        behind = clients_between(self._record, self._published_round)
        if len(behind) == 1 and not self._is_warned:
            logger.warning(
                f"Round {rounds[-1]['round']} is published, and the difference from what was published before is "
                "the update of a single client. Whoever has both has the update. Let more clients count in a "
                "round, or publish less often (`save_rounds`)."
            )
        self._published_round = rounds[-1]["round"] if rounds else 0
        names = [*self._saved_names, CARD_NAME]
        repository = self.hub_model_id
        return publish(folder, names, documents, repository, commit_message, token, revision, blocking, self._folder)

    def _warn_of_single_clients(self) -> None:
        """At the start of a run each of whose rounds is going to be the update of a client, for all to see."""
        if self._publishes_rounds and self.sampler.num_sampled == 1 and self.is_world_process_zero():
            logger.warning(
                "Each round has a single client and is published, so the difference of two published rounds is the "
                "update of a client. Raise `clients_per_round`, or set `hub_strategy='end'`."
            )
            self._is_warned = True

    @property
    def _publishes_rounds(self) -> bool:
        return self.args.push_to_hub and self.args.hub_strategy != HubStrategy.END

    @property
    def _openings(self) -> Openings:
        args = self.args
        return Openings(args.publish_client_names, args.publish_client_metrics, args.publish_label_counts)

    def _card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: list[str] | None = None
    ) -> ModelCard:
        base = get_config_model_id(self.model.config)
        peft_config = self._peft_config
        record = self._record
        if self._base_changes is not None:  # what is published is a LoRA, whatever was trained
            record = {**record, "peft_type": peft_type_name(LoraConfig())}
        return model_card(
            published_record(record, self._openings),
            peft_config.task_type if peft_config is not None else None,
            self.hub_model_id,
            base if base and not os.path.isdir(base) else None,
            model_name,
            dataset_name,
            tags,
            model_class=type(
                self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
            ).__name__,
            num_labels=getattr(self.model.config, "num_labels", None),
        )

    def _begin_record(self) -> None:
        if self.is_world_process_zero():
            self._record_files.begin(self._record)

    def _append_round(self, is_saved: bool) -> None:
        if self.is_world_process_zero():
            self._record_files.append(self._record, is_saved)

    def _write_record(self, folder: Path) -> None:
        if self.is_world_process_zero():
            self._record_files.write(folder, self._record)

    def _new_record(self) -> dict[str, Any]:
        column, base = self.args.label_column, get_config_model_id(self.model.config)
        peft_config = self._peft_config
        return {
            "format": WHOLE,
            # of a local folder only the name
            "base_model": os.path.basename(os.path.normpath(base)) if os.path.isdir(base) else base,
            "base_digest": self._base_digest,
            "initial_digest": self._initial_digest,
            "peft_type": peft_type_name(peft_config) if peft_config is not None else None,
            "num_trainable_parameters": sum(tensor.numel() for tensor in self.federation.state.values()),
            "num_local_parameters": sum(self.federation.state[key].numel() for key in self._local_keys),
            "aggregation": self.args.aggregation,
            "federation": federation_settings(self.args),
            "peft_config": peft_fields(peft_config) if peft_config is not None else {},
            "settings": local_settings(self.args),
            "arguments": self._arguments | described_arguments({}, self.callback_handler.callbacks),
            "seed": self.args.seed,
            "num_rounds": self.args.num_rounds,
            "num_sampled": self.sampler.num_sampled,
            "partition": self.args.partition,
            "label_column": column,
            "clients": client_sizes(self._clients, column),
            "side_metrics": [],
            "start": {"eval": None},
            "rounds": [],
        }

    @property
    def _peft_config(self) -> PeftConfig | None:
        """That of the adapter; `None` for a plain model."""
        return self.model.peft_config[self.model.active_adapters[0]] if isinstance(self.model, PeftModel) else None
